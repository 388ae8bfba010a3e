"""After every stage: how many documents are left, why the others were dropped, and an error if none is left."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console

from data_tools.pipeline import Pipeline
from data_tools.report import sum_tallies
from data_tools.stages.tokenize import plan_datasets

SHOWN_REASONS = 5
_WAYS_OUT = {
    "normalize": "change data_recipe.normalize, or switch it off with data_recipe.normalize.enabled=false",
    "filter": "change the thresholds in data_recipe.filter, or switch it off with data_recipe.filter.enabled=false",
    "decontaminate": "check data_recipe.decontaminate.files, or raise data_recipe.decontaminate.max_hits",
}


def report_stage(pipeline: Pipeline, stage: str, console: Console) -> None:
    """Print what a finished stage left.

    Raises:
        ValueError: it left no document, with the reasons.
    """
    if stage in _WAYS_OUT and stage in pipeline.steps:
        total = sum_tallies(stage, pipeline.steps[stage].folder)
        _require_documents(stage, total)
        _print(f"{total['documents_out']:,} of {total['documents_in']:,} documents are left{_reasons(total)}", console)
        for source in sorted(
            {name for by_source in total["reasons"].values() for name in by_source} - set(total["kept"])
        ):
            console.print(f"no document of source {source} is left", style="yellow", highlight=False, markup=False)
    elif stage in ("exact", "near") and stage in pipeline.steps:
        dropped = sum(len(np.load(path, mmap_mode="r")) for path in pipeline.steps[stage].folder.glob("pairs-*.npy"))
        _print(f"{dropped:,} duplicates are dropped", console)
    elif stage == "tokenize":
        settings = pipeline.recipe.tokenize
        datasets = plan_datasets(pipeline.steps["tokenize_encode"].folder, settings.min_documents)
        if not any(name.endswith("/train") for name in datasets):
            documents = sum(facts["documents"] for facts in datasets.values())
            raise ValueError(
                f"no document is left to train on: data_recipe.tokenize.held_out={settings.held_out} holds out all {documents:,} "
                "for validation; lower it, or add text"
            )


def _require_documents(stage: str, total: dict[str, Any]) -> None:
    if total["documents_out"]:
        return
    example = next((found[0] for label, found in total["examples"].items() if label != "kept" and found), None)
    first = f" (for example {example['id']}: {example['text'][:80]!r})" if example else ""
    raise ValueError(
        f"{stage} dropped all {total['documents_in']:,} documents{_reasons(total)}{first}; {_WAYS_OUT[stage]}"
    )


def _reasons(total: dict[str, Any]) -> str:
    """The most frequent reasons with their documents; repairs, which drop nothing, are not among them."""
    counts = {
        reason: sum(count for count, _ in by_source.values())
        for reason, by_source in total["reasons"].items()
        if not reason.startswith("repaired: ")
    }
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{reason} {count:,}" for reason, count in most[:SHOWN_REASONS])
    return (
        f": {shown}" + (f" and {len(most) - SHOWN_REASONS} more reasons" if len(most) > SHOWN_REASONS else "")
        if most
        else ""
    )


def _print(line: str, console: Console) -> None:
    console.print(f"{'':20} {line}", highlight=False, markup=False, soft_wrap=True)
