"""`mlite prune`: a smaller model cut out of a trained one (Minitron, arXiv 2407.14679).

Importance is measured on training data (or taken from `scores`), then the model is cut tensor by tensor. The result is a run directory
with one checkpoint that holds weights only: train it with `init_from`, evaluate it, convert it.

python -m megatron_lite prune checkpoint=runs/smoke output=runs/pruned target.hidden_size=192 target.ffn_size=768
python -m megatron_lite prune checkpoint=some/hugging_face_folder data=mine output=runs/pruned target.num_layers=24
torchrun --nproc-per-node 4 -m megatron_lite prune checkpoint=runs/large parallel.tp=2 output=runs/pruned target.ffn_size=11520
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_lite.atomic import check_place, write_json
from megatron_lite.commands.command import run_command
from megatron_lite.commands.evaluate import compose_over_run
from megatron_lite.commands.prune_session import PruneConfig, Session, dividing
from megatron_lite.commands.ranks import all_ranks
from megatron_lite.compress.axes import layer_axes
from megatron_lite.compress.scores import Scores
from megatron_lite.compress.search import candidates, check_budget
from megatron_lite.compress.sizes import sizes_of
from megatron_lite.compress.surgery import KeptScales, PrunedTensors
from megatron_lite.compress.target import size_warnings
from megatron_lite.config.compose import to_dict
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.flops import parameter_count
from megatron_lite.ranks import Ranks
from megatron_lite.runtime import Runtime, set_threads
from megatron_lite.weights import SCALES, Weights, check_empty, open_weights, save_weights

REPORT = "prune.json"


def main() -> None:
    """Parse, prune, exit."""
    purpose = "Cut a smaller model out of a trained one, by the importance of its channels, heads, neurons and layers."
    run_command("prune", PruneConfig, purpose, prune, compose=compose_prune)


def compose_prune(overrides: list[str]) -> PruneConfig:
    """See `compose_over_run`."""
    return compose_over_run("prune", PruneConfig, overrides)


def prune(config: PruneConfig) -> int:
    """Write the pruned model to `config.output`, and print what was cut.

    Raises ValueError (on several ranks CheckpointError) for sizes that the model cannot have, and data that is not its own.
    """
    with all_ranks() as (runtime, ranks):
        report = cut(config, runtime, ranks)
        if runtime.is_main:
            _print(config, report)
    return 0


def cut(config: PruneConfig, runtime: Runtime, ranks: Ranks) -> dict[str, Any]:
    """Write the pruned model; the report, the same on every rank. Collective."""
    ranks.attempt("check the config", lambda: config.validate(runtime.world_size))
    ranks.first("check the output", lambda: check_place(Path(config.output)))
    set_threads(config.threads)
    weights = open_weights(config.checkpoint, ranks, more=SCALES)
    model, options = weights.config, config.importance
    sizes = ranks.attempt("check the target", lambda: _checked_sizes(config, model))
    if config.budget.is_given:  # before hours of calibration
        ranks.attempt("check the budget", lambda: check_budget(model, target=config.target, budget=config.budget))
    session = Session(config, weights, runtime, ranks)
    scores = session.scores()
    found = []
    if config.budget.is_given:
        found = _searched(config, session, scores)
        sizes, layers = found[0]["sizes"], tuple(found[0]["layers"])
    else:
        layers = config.target.layers_of(model, scores.removal_order(model, options))
    pruned = _pruned(config, weights, scores, sizes, layers)
    report = _report(config, weights, pruned, layers) | {"samples": scores.samples, "candidates": found}
    report["loss_before"] = session.losses(weights)
    report["loss_after"] = session.losses(pruned)
    ranks.first("write", lambda: _write(config, pruned, report))
    return report


def _pruned(
    config: PruneConfig, weights: Weights, scores: Scores, sizes: dict[str, int], layers: tuple[int, ...]
) -> Weights:
    selection = scores.select(weights.config, sizes, layers, config.importance)
    tensors = PrunedTensors(weights.tensors, weights.config, selection, head_residual=config.head_residual)
    scales = {} if config.head_residual else {kind: KeptScales(of, layers) for kind, of in weights.more.items()}
    return replace(weights, path=Path(config.output), config=tensors.config, tensors=tensors, more=scales)


def _searched(config: PruneConfig, session: Session, scores: Scores) -> list[dict[str, Any]]:
    """The candidates of the budget as plain values, from the one of least loss on."""
    model = session.weights.config
    found = session.ranks.attempt(
        "search", lambda: candidates(model, scores, config.importance, target=config.target, budget=config.budget)
    )
    rows = []
    for candidate in found:
        pruned = _pruned(config, session.weights, scores, dict(candidate.sizes), candidate.layers)
        losses = session.losses(pruned, windows=config.budget.windows)
        mean = sum(losses.values()) / len(losses) if losses else None
        rows.append(asdict(candidate) | {"layers": list(candidate.layers), "loss": mean})
        if session.runtime.is_main and not config.json:
            print(f"candidate {len(rows)} of {len(found)}: {_described(rows[-1])}", flush=True)
    measured = all(row["loss"] is not None for row in rows)
    return sorted(rows, key=lambda row: row["loss"]) if measured else rows


def _described(row: dict[str, Any]) -> str:
    loss = "no loss" if row["loss"] is None else f"loss {row['loss']:.4f}"
    sizes = ", ".join(f"{axis} {size}" for axis, size in row["sizes"].items())
    return (
        f"{sizes}, {len(row['layers'])} layers; {row['parameters']:,} parameters, cache {row['cache'] / 2**30:.3g} GiB, "
        f"{row['kept']:.1%} of the importance, {loss}"
    )


def _checked_sizes(config: PruneConfig, model: ModelConfig) -> dict[str, int]:
    """The target's sizes. Raises ValueError for what `model` cannot be cut to."""
    layer_axes(model)
    config.target.kept_units(model)
    sizes = config.target.sizes(model)
    if config.target.layers is not None or config.target.pattern is not None:
        config.target.layers_of(model, ())  # that they are there at all
    return sizes


def _report(config: PruneConfig, weights: Weights, pruned: Weights, layers: tuple[int, ...]) -> dict[str, Any]:
    """What was cut: plain values, for the printed table, the JSON file and the manifest."""
    before, after = sizes_of(weights.config), sizes_of(pruned.config)
    symbols, tp = weights.config.symbols, config.parallel.tp
    parameters = [parameter_count(weights.config), parameter_count(pruned.config)]
    warnings = size_warnings(pruned.config, tp=tp)
    if parameters[0] == parameters[1]:
        warnings.append("nothing was cut: the sizes that were asked for are the model's own")
    if (possible := dividing(pruned.config, config.parallel).tp) != tp:
        warnings.append(
            f"parallel.tp={tp} ranks cannot share this model; its loss was measured with parallel.tp={possible}"
        )
    return {
        "checkpoint": str(weights.path),
        "parameters": parameters,
        "sizes": {axis: [before[axis], after.get(axis, 0)] for axis in before},
        "layers": [len(symbols), len(layers)],
        "layer_map": list(layers),
        "removed_layers": {str(layer): symbols[layer] for layer in range(len(symbols)) if layer not in layers},
        "head_residual": config.head_residual,
        "importance": to_dict(config.importance),
        "warnings": warnings,
    }


def _write(config: PruneConfig, pruned: Weights, report: dict[str, Any]) -> None:
    output = Path(config.output)
    check_empty(output, key="output")
    save_weights(output, pruned, pruned=report)
    write_json(output / REPORT, report)


def _print(config: PruneConfig, report: dict[str, Any]) -> None:
    if config.json:
        print(json.dumps({"output": config.output} | report))
        return
    table = Table(title=f"{report['checkpoint']} -> {config.output}")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    rows = {"parameters": report["parameters"], **report["sizes"], "residual layers": report["layers"]}
    for name, (before, after) in rows.items():
        table.add_row(name, f"{before:,}", f"{after:,}")
    for source, before in report["loss_before"].items():
        table.add_row(f"loss on {source}", f"{before:.4f}", f"{report['loss_after'][source]:.4f}")
    console = Console()
    console.print(table)
    if report["removed_layers"]:
        gone = ", ".join(f"{layer} ({symbol})" for layer, symbol in report["removed_layers"].items())
        console.print(f"removed layers: {gone}", highlight=False)
    if not report["loss_before"]:
        console.print("no loss was measured: no data with a `validation` file was given", highlight=False)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", highlight=False)
