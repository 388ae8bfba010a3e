"""The last part of `mlite prepare`: finished files become visible in the output folder, `corpus.json` last."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rich.console import Console

from data_tools.execution import DONE
from data_tools.output_folder import CORPUS, OutputFolder
from data_tools.pipeline import Pipeline
from data_tools.report import collect, timing, to_markdown
from data_tools.starter_blend import data_yaml, left_out
from megatron_lite.atomic import atomic_path, write_json, write_text

WRITTEN = ("quarantine.jsonl", "report.json", "report.md", "timing.json", CORPUS)


def publish(pipeline: Pipeline, output: OutputFolder, *, cores: int, console: Console) -> None:
    """Link the finished files into the output folder. `corpus.json` is removed first and written last.

    Raises:
        ValueError: a file that is not ours has a name that is needed.
    """
    folder, steps = output.path, pipeline.steps
    report = collect(pipeline)
    merged = [path for path in sorted(steps["tokenize_merge"].folder.glob("*.*")) if _is_dataset_file(path)]
    links = {path.name: path for path in merged}
    links |= {f"tokenizer/{path.name}": path for path in sorted((steps["tokenizer"].folder / "tokenizer").iterdir())}
    blend = _blend_name(output, pipeline.recipe.name, console)
    names = {*links, *WRITTEN, blend}
    output.reserve(names)
    (folder / CORPUS).unlink(missing_ok=True)
    output.keep_only(names)
    for name, path in links.items():
        _link(path, folder / name)
    quarantine = sorted(steps["read"].folder.glob("*.quarantine.jsonl"))
    write_text(folder / "quarantine.jsonl", "".join(path.read_text(encoding="utf-8") for path in quarantine))
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", to_markdown(report))
    output.write_blend(blend, data_yaml(pipeline.recipe.name, report["datasets"]))
    write_json(folder / "timing.json", timing(pipeline, cores))
    marker = {key: report[key] for key in ("recipe", "datasets")} | {"tokenizer": report["tokenizer"]["fingerprint"]}
    write_json(folder / CORPUS, marker)
    tokens = sum(facts["tokens"] for facts in report["datasets"].values())
    for line in left_out(report["datasets"]):
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    line = f"{len(report['datasets'])} datasets, {tokens:,} tokens in {folder}; see report.md"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _is_dataset_file(path: Path) -> bool:
    return path.suffix in (".bin", ".idx", ".json") and path.name != DONE


def _blend_name(output: OutputFolder, recipe: str, console: Console) -> str:
    """`data/<recipe>.yaml`, or another name where that is the user's: written by hand, or edited."""
    name = f"data/{recipe}.yaml"
    output.release_edited_blend()
    if (output.path / name).exists() and name not in output.files:
        new = f"data/{recipe}_new.yaml"
        line = f"{output.path / name} was edited and stays as it is; the blend of this corpus is {new}"
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
        return new
    return name


def _link(source: Path, target: Path) -> None:
    """`source` under a second name, or a copy where the file system has no links; atomic either way."""
    with atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
