"""`mlite evaluate`: loss and perplexity by source on held-out data.

python -m megatron_lite evaluate checkpoint=runs/smoke
python -m megatron_lite evaluate checkpoint=some/hugging_face_folder data=mine
torchrun --nproc-per-node 4 -m megatron_lite evaluate checkpoint=runs/large parallel.tp=2
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_lite.commands.command import run_command
from megatron_lite.commands.ranks import all_ranks
from megatron_lite.data.config import DataConfig
from megatron_lite.data.loader import validation_batches
from megatron_lite.data.source import Source, open_validation
from megatron_lite.engine.fsdp import computing
from megatron_lite.objectives.next_token import NextToken
from megatron_lite.parallel.assemble import assemble, from_tensors
from megatron_lite.parallel.mesh import Mesh, ParallelConfig, sum_over
from megatron_lite.precision.dtypes import PrecisionConfig
from megatron_lite.ranks import Ranks
from megatron_lite.runtime import Runtime
from megatron_lite.training.build import build_grid, check_vocabulary, open_tokenizer, prepare_data
from megatron_lite.training.support import refuse_unsupported
from megatron_lite.weights import Weights, open_weights


@dataclass
class EvaluateConfig:
    """`mlite evaluate`: the model comes from `checkpoint`, the data from here."""

    checkpoint: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: Any = None  # an `EngineConfig`, chosen by its group
    micro_batch_size: int = 8
    json: bool = False

    def validate(self, world_size: int = 1) -> None:
        """Raise ValueError naming the key if a value is invalid."""
        if self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={self.micro_batch_size} must be at least 1")
        if self.engine.name != "fsdp":
            raise ValueError(f"engine={self.engine.name} only trains; evaluate with engine=fsdp")
        for section in (self.data, self.precision, self.engine):
            section.validate()
        self.parallel.validate(world_size)
        refuse_unsupported(
            "evaluate", parallel=self.parallel, engine=self.engine, precision=self.precision, world_size=world_size
        )


def main() -> None:
    """Parse, evaluate, exit."""
    run_command("evaluate", EvaluateConfig, "Loss and perplexity of a model on held-out data, by source.", evaluate)


def evaluate(config: EvaluateConfig) -> int:
    """Print a table (and with `json=true` one JSON line) of the loss on every held-out file of `data`.

    Raises ValueError (on several ranks CheckpointError) when model, tokenizer, data and layout do not belong together.
    """
    with all_ranks() as (runtime, ranks):
        path, losses = measure(config, runtime, ranks)
        if runtime.is_main:
            _print(losses, str(path), as_json=config.json)
    return 0


def measure(config: EvaluateConfig, runtime: Runtime, ranks: Ranks) -> tuple[Path, dict[str, float]]:
    """(what was read, loss of each held-out source in nats a counted token), the same on every rank. Collective."""
    ranks.attempt("check the config", lambda: config.validate(runtime.world_size))
    weights = open_weights(config.checkpoint, ranks)
    held_out = ranks.attempt("open the data", lambda: _held_out(config, weights, runtime))
    mesh = build_grid(config.parallel, config.engine, world_size=runtime.world_size, device=runtime.device)
    dtype = config.precision.dtype
    objective, _ = ranks.attempt(
        "read the weights",
        lambda: assemble(
            weights.config,
            mesh=mesh,
            parallel=config.parallel,
            fill=from_tensors(weights.tensors),
            wrap=NextToken,
            distribute=config.engine.distribute(mesh, dtype),
        ),
    )
    objective.eval()
    return weights.path, {name: _loss(objective, source, config, mesh) for name, source in held_out.items()}


def _held_out(config: EvaluateConfig, weights: Weights, runtime: Runtime) -> dict[str, Source]:
    """The held-out sources. Raises ValueError when there are none, or they do not belong to the model."""
    if config.data.sample_corpus and not Path(config.data.tokenizer).exists():
        if weights.manifest is None:
            raise ValueError(
                f"data=sample is not built yet, and {config.checkpoint} was not trained on it; give data=<a group of your own>, "
                "or build it with `make smoke`"
            )
        prepare_data(config.data, vocab_size=weights.config.vocab_size, report=print if runtime.is_main else None)
    tokenizer = open_tokenizer(config.data)
    check_vocabulary(weights.config, tokenizer)
    trained_with = weights.tokenizer_fingerprint
    if trained_with not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"{config.checkpoint} was trained with tokenizer {trained_with}, but data.tokenizer={config.data.tokenizer} is "
            f"{tokenizer.fingerprint}: losses would mean nothing; tokenize the data with the model's tokenizer"
        )
    held_out = open_validation(config.data, tokenizer)
    if not held_out:
        raise ValueError("data: no source has a `validation` file; name one for at least one source")
    return held_out


@torch.no_grad()
def _loss(objective: NextToken, source: Source, config: EvaluateConfig, mesh: Mesh) -> float:
    """Mean loss in nats over the counted tokens of the held-out windows, which the data-parallel ranks share."""
    windows = min(config.data.validation.windows, source.num_windows)
    batches = validation_batches(
        source,
        windows=windows,
        micro_batch_size=min(config.micro_batch_size, windows),  # the last batch is filled up with blank windows
        rank=mesh.data_parallel_rank,
        ranks=mesh.data_parallel_size,
    )
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for batch in batches:
        with computing(config.precision.dtype, objective):
            loss = objective({key: value.to(mesh.device) for key, value in batch.items()})
        sums += torch.stack([loss.total.double(), loss.tokens.double()])
    total, tokens = sum_over(mesh.loss_groups, sums).tolist()
    return total / max(tokens, 1.0)


def _print(losses: dict[str, float], model: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"checkpoint": model, "val_loss": losses}))
        return
    table = Table(title=model)
    for column in ("source", "loss", "perplexity"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for source, loss in losses.items():
        table.add_row(source, f"{loss:.4f}", f"{math.exp(min(loss, 700.0)):.2f}")
    Console().print(table)
