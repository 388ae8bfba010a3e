"""The command: `python -m megatron_lite prepare data_recipe=<name>` turns sources into a tokenized corpus.

read -> normalize -> filter -> exact -> near -> decontaminate -> tokenizer -> tokenize -> <output>/

<output>/tokenizer/                          Hugging Face form
<output>/<dataset>[.validation].{bin,idx,json}   token files and their side-cars
<output>/report.{md,json} timing.json        counts, reasons, examples; times
<output>/data/<name>.yaml                    a 70/15/15 blend of all datasets, for `--config-dir <output> data=<name>`
<output>/quarantine.jsonl                    rows that could not be used: where and why
<output>/corpus.json                         written last: the corpus is whole
<output>/work/                               the stages' files, by which a killed run goes on
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from data_tools.execution import DONE, is_done, run_step
from data_tools.pipeline import STAGES, Pipeline
from data_tools.recipe import ExecutorConfig, RecipeConfig
from data_tools.report import collect, timing, to_markdown
from data_tools.stages.read import ReadStep
from data_tools.starter_blend import data_yaml
from data_tools.steps import Step
from megatron_lite.atomic import atomic_path, write_json, write_text
from megatron_lite.commands.command import run_command
from megatron_lite.file_lock import FileLock


@dataclass
class PrepareConfig:
    """The command's own keys. `stages`: which to run (the ones before must be finished); `keep_work=false` removes `work/` at the end."""

    data_recipe: RecipeConfig = field(default_factory=RecipeConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    keep_work: bool = True


def prepare_command(config: PrepareConfig) -> int:
    """`mlite prepare`; returns the exit code."""
    prepare(config)
    return 0


def prepare(config: PrepareConfig, console: Console | None = None) -> Path:
    """Run the stages of `config` that are not finished; returns the output folder.

    Raises:
        ValueError: a setting, a source or a file that cannot be used, with the way out.
    """
    console = console or Console(stderr=True)
    recipe = config.data_recipe
    recipe.validate()
    if unknown := [stage for stage in config.stages if stage not in STAGES]:
        raise ValueError(f"stages={unknown} are none; the stages are {', '.join(STAGES)}")
    output = Path(recipe.output).absolute()
    with FileLock(output / ".lock", key="data_recipe.output", value=output):
        # Read before any step runs: a source or tokenizer that is not there is told at once.
        pipeline = Pipeline(recipe, output)
        for stage in STAGES:
            for step in pipeline.stages[stage]:
                if stage in config.stages:
                    _require_earlier(pipeline, step)
                    _tell(step, run_step(step, config.executor, console), console)
                    if isinstance(step, ReadStep):
                        _check_sources(pipeline, step, console)
        if all(is_done(step) for step in pipeline.steps.values()):
            _publish(pipeline, max(1, config.executor.workers), console)
            if not config.keep_work:
                shutil.rmtree(output / "work")
    return output


def _require_earlier(pipeline: Pipeline, step: Step) -> None:
    for earlier in pipeline.steps.values():
        if earlier is step:
            return
        if not is_done(earlier):
            raise ValueError(
                f"stages: {step.name} needs {earlier.name}, which is not finished with these settings; run the stages in order"
            )


def _tell(step: Step, seconds: float, console: Console) -> None:
    console.print(f"{step.name:20} {f'{seconds:8.1f} s' if seconds else '  finished before'}", highlight=False)


def _check_sources(pipeline: Pipeline, step: ReadStep, console: Console) -> None:
    """Tell of rows that cannot be used; a source without a single document is a mistake in the recipe, told before hours of work."""
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


def _publish(pipeline: Pipeline, cores: int, console: Console) -> None:
    """Link the finished files into the output folder; `corpus.json` goes first and comes back last."""
    output, steps = pipeline.output, pipeline.steps
    report = collect(pipeline)
    (output / "corpus.json").unlink(missing_ok=True)
    for stale in [*output.glob(".*.tmp-*"), *output.glob("tokenizer/.*.tmp-*")]:  # of a run that was killed here
        stale.unlink()
    merged = sorted(
        path for path in steps["tokenize_merge"].folder.glob("*.*") if path.suffix in (".bin", ".idx", ".json")
    )
    merged = [path for path in merged if path.name != DONE]
    for stale in [*output.glob("*.bin"), *output.glob("*.idx"), *output.glob("*.json")]:
        if stale.name not in {path.name for path in merged} and stale.name != "timing.json":
            stale.unlink()
    for path in merged:
        _link(path, output / path.name)
    tokenizer = sorted((steps["tokenizer"].folder / "tokenizer").iterdir())
    for stale in output.glob("tokenizer/*"):
        if stale.name not in {path.name for path in tokenizer}:
            stale.unlink()
    for path in tokenizer:
        _link(path, output / "tokenizer" / path.name)
    quarantine = sorted(steps["read"].folder.glob("*.quarantine.jsonl"))
    write_text(output / "quarantine.jsonl", "".join(path.read_text(encoding="utf-8") for path in quarantine))
    write_json(output / "report.json", report)
    write_text(output / "report.md", to_markdown(report))
    shutil.rmtree(output / "data", ignore_errors=True)  # of a recipe of another name
    write_text(
        output / "data" / f"{pipeline.recipe.name}.yaml", data_yaml(pipeline.recipe.name, output, report["datasets"])
    )
    write_json(output / "timing.json", timing(pipeline, cores))
    write_json(
        output / "corpus.json",
        {key: report[key] for key in ("recipe", "datasets")} | {"tokenizer": report["tokenizer"]["fingerprint"]},
    )
    tokens = sum(facts["tokens"] for facts in report["datasets"].values())
    console.print(f"{len(report['datasets'])} datasets, {tokens:,} tokens in {output}; see report.md", highlight=False)


def _link(source: Path, target: Path) -> None:
    """`source` under a second name, or a copy where the file system has no links; atomically either way."""
    with atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def main() -> None:
    """Parse, prepare, exit."""
    purpose = "From raw text to a tokenized corpus that `mlite train` reads; run it again to continue where it stopped."
    run_command("prepare", PrepareConfig, purpose, prepare_command)
