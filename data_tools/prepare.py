"""The command: `mlite prepare data_recipe=<name>` turns sources into a tokenized corpus.

read -> normalize -> filter -> exact -> near -> decontaminate -> tokenizer -> tokenize -> <output>/

<output>/recipe.json                         whose corpus this is, and which files are part of it
<output>/tokenizer/                          Hugging Face form
<output>/<dataset>[.validation].{bin,idx,json}   token files and their sidecars
<output>/report.{md,json} timing.json        counts, reasons, examples; times
<output>/data/<name>.yaml                    a 70/15/15 blend of all datasets, for `--config-dir <output> data=<name>`
<output>/quarantine.jsonl                    rows that could not be used: where and why
<output>/corpus.json                         written last: the corpus is complete
<output>/work/                               files of the stages, from which a killed run continues
"""

from __future__ import annotations

import difflib
import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from data_tools.execution import DONE, is_done, run_step
from data_tools.output_folder import open_output
from data_tools.pipeline import STAGES, Pipeline
from data_tools.publish import publish
from data_tools.recipe import ExecutorConfig, RecipeConfig
from data_tools.remaining import report_stage
from data_tools.stages.read import ReadStep
from data_tools.steps import Step
from megatron_lite.commands.command import run_command
from megatron_lite.file_lock import FileLock

IMPORTED_BY_TASKS = ("ftfy", "py3langid", "sentencepiece")


@dataclass
class PrepareConfig:
    """The command's own keys. `stages`: which to run (earlier ones must be finished); `keep_work=false` removes `work/` at the end.

    `replace`: replace the corpus of another recipe in `data_recipe.output`.
    """

    data_recipe: RecipeConfig = field(default_factory=RecipeConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    keep_work: bool = True
    replace: bool = False


def prepare_command(config: PrepareConfig) -> int:
    """`mlite prepare`; returns the exit code."""
    prepare(config)
    return 0


def prepare(config: PrepareConfig, console: Console | None = None) -> Path:
    """Run the stages of `config` that are not finished; returns the output folder.

    Raises:
        ValueError: a setting, a source or a file is invalid; a stage leaves no document; the output folder is not ours.
        ModuleNotFoundError: a package of the [data] extra is missing.
    """
    console = console or Console(stderr=True)
    recipe = config.data_recipe
    recipe.validate()
    config.executor.validate()
    _check_stages(config.stages)
    for name in IMPORTED_BY_TASKS:  # a missing one is reported now, not after hours
        importlib.import_module(name)
    folder = Path(recipe.output).absolute()
    open_output(folder, recipe, replace=config.replace)  # even the lock is not put into a folder that is not ours
    with FileLock(folder / ".lock", key="data_recipe.output", value=folder):
        output = open_output(folder, recipe, replace=config.replace)
        # Planned before any step runs: a source, tokenizer or evaluation that does not exist is reported at once.
        pipeline = Pipeline(recipe, folder)
        output.claim()
        for stage in STAGES:
            if stage in config.stages:
                _run_stage(pipeline, stage, config.executor, console)
        if all(is_done(step) for step in pipeline.steps.values()):
            publish(pipeline, output, cores=max(1, config.executor.workers), console=console)
            if not config.keep_work:
                output.remove_work()
    return folder


def _check_stages(stages: list[str]) -> None:
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        near = difflib.get_close_matches(unknown[0], STAGES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"stages={unknown} do not exist; {hint}The stages are {', '.join(STAGES)}")


def _run_stage(pipeline: Pipeline, stage: str, executor: ExecutorConfig, console: Console) -> None:
    for step in pipeline.stages[stage]:
        _require_earlier(pipeline, step)
        seconds = run_step(step, executor, console)
        console.print(f"{step.name:20} {f'{seconds:8.1f} s' if seconds else '  finished before'}", highlight=False)
        if isinstance(step, ReadStep):
            _check_sources(pipeline, step, console)
    report_stage(pipeline, stage, console)


def _require_earlier(pipeline: Pipeline, step: Step) -> None:
    for earlier in pipeline.steps.values():
        if earlier is step:
            return
        if not is_done(earlier):
            raise ValueError(
                f"stages: {step.name} needs {earlier.name}, which is not finished with these settings; run the stages in order"
            )


def _check_sources(pipeline: Pipeline, step: ReadStep, console: Console) -> None:
    """Report rows that cannot be used. A source without a single document is a mistake in the recipe, reported before hours of work."""
    for path in sorted(step.folder.glob("*.quarantine.jsonl")):
        if bad := path.read_text(encoding="utf-8").split("\n")[:-1]:
            first = json.loads(bad[0])
            console.print(
                f"{len(bad):,} rows or files cannot be used, first {first['place']}: {first['reason']}; all are in {path}",
                style="yellow", highlight=False, markup=False, emoji=False, soft_wrap=True,
            )  # fmt: skip
    found = {path.name.split("-")[0] for path in step.folder.glob("*.jsonl.zst")}
    for name, source in pipeline.recipe.sources.items():
        if not any(f"{i:05d}" in found for i, piece in enumerate(step.pieces) if piece.source == name):
            (step.folder / DONE).unlink()
            raise ValueError(
                f"data_recipe.sources.{name}: no document in {source.path} (empty files, or every row unusable: see "
                f"{step.folder}/*.quarantine.jsonl)"
            )


def main() -> None:
    """Parse, prepare, exit."""
    purpose = "From raw text to a tokenized corpus that `mlite train` reads; the same command continues a run that was stopped."
    run_command("prepare", PrepareConfig, purpose, prepare_command)
