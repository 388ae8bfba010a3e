"""`mlite evaluate`: loss, perplexity and bits per byte by source on held-out data.

Data, sequence length, windows, precision, micro-batch size and threads are those of the run unless the command line
overrides them. At the layout of the training run the losses equal those that it logged, to the last digit, in FP8 too:
the stored scales of delayed scaling are read, and products are computed as exactly as the run did when it was saved.

python -m megatron_lite evaluate checkpoint=runs/smoke
python -m megatron_lite evaluate checkpoint=runs/smoke data.validation.windows=1000
python -m megatron_lite evaluate checkpoint=some/hugging_face_folder data=mine
torchrun --nproc-per-node 4 -m megatron_lite evaluate checkpoint=runs/large parallel.tp=2
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_lite.commands.command import check_at_least_one, run_command
from megatron_lite.commands.ranks import all_ranks
from megatron_lite.config.compose import compose_config, from_dict, register_choice
from megatron_lite.config.errors import key_of
from megatron_lite.data.config import DataConfig
from megatron_lite.data.loader import HeldOut, validation_batches
from megatron_lite.data.packing import Batch
from megatron_lite.data.sidecar import TokenizerIdentity
from megatron_lite.data.token_bytes import bits_per_byte
from megatron_lite.engine.fsdp import computing
from megatron_lite.objectives.next_token import NextToken
from megatron_lite.parallel.assemble import assemble, from_tensors
from megatron_lite.parallel.mesh import ParallelConfig
from megatron_lite.parallel.parallelize import Recipe
from megatron_lite.parallel.sequence_length import check_layout
from megatron_lite.precision.dtypes import PrecisionConfig
from megatron_lite.precision.numerics import numerics_of
from megatron_lite.precision.recipes import Precision, precision_class
from megatron_lite.ranks import Ranks
from megatron_lite.runtime import Runtime, set_threads
from megatron_lite.tracking.console import number, perplexity
from megatron_lite.training.build import build_grid
from megatron_lite.training.data import check_vocabulary, held_out, open_tokenizer, prepare_data
from megatron_lite.training.ladder import Ladder
from megatron_lite.training.support import refuse_unsupported
from megatron_lite.weights import SCALES, Weights, open_weights, trained_with


@dataclass
class EvaluateConfig:
    """`mlite evaluate`. Keys that are not given are taken from the run of `checkpoint` (see `compose_over_run`)."""

    checkpoint: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    precision: Any = None  # a `Precision`, chosen by its group
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: Any = None  # an `EngineConfig`, chosen by its group
    micro_batch_size: int = 8
    threads: int | None = None  # CPU threads of a process; null leaves the choice to torch
    json: bool = False

    def validate(self, world_size: int = 1) -> None:
        """Raise ValueError naming the key if a value is invalid."""
        check_at_least_one(self, "micro_batch_size", "threads")
        self.parallel.validate(world_size)
        refuse_unsupported(  # first: nobody should have to install an engine to learn that it does not evaluate
            "evaluate", parallel=self.parallel, engine=self.engine, precision=self.precision, world_size=world_size
        )
        for section in (self.precision, self.engine):
            section.validate()


def main() -> None:
    """Parse, evaluate, exit."""
    purpose = "Loss, perplexity and bits per byte of a model on held-out data, by source."
    run_command("evaluate", EvaluateConfig, purpose, evaluate, compose=compose_evaluate)


def compose_evaluate(overrides: list[str]) -> EvaluateConfig:
    """See `compose_over_run`."""
    return compose_over_run("evaluate", EvaluateConfig, overrides)


def compose_over_run(name: str, schema: type, overrides: list[str]) -> Any:
    """The config of `mlite <name>` with `overrides`, over what the run that `checkpoint` names was trained with.

    `data=checkpoint` and `precision=checkpoint`, the defaults, are those of the run. Another `data` is read in windows like
    those of the run. Raises ConfigError as `compose_config` does.
    """
    named = [override for override in overrides if key_of(override) == "checkpoint"]
    run = trained_with(compose_config("evaluate", EvaluateConfig, named).checkpoint)
    data, train = run.get("data", {}), run.get("train", {})
    register_choice("checkpoint", data, group="data")
    precision = run.get("precision", {})
    register_choice("checkpoint", from_dict(precision_class(precision.get("name", "")), precision), group="precision")
    windows = {key: data[key] for key in ("seq_len", "reset_attention", "mask_eod_loss", "validation") if key in data}
    defaults = schema(
        data=from_dict(DataConfig, windows),
        micro_batch_size=train.get("micro_batch_size", schema.micro_batch_size),  # type: ignore[attr-defined]
        threads=train.get("threads"),
    )
    return compose_config(name, defaults, overrides)


def evaluate(config: EvaluateConfig) -> int:
    """Print a table (and with `json=true` one JSON line) of the loss on every held-out file of `data`.

    Raises ValueError (on several ranks CheckpointError) when model, tokenizer, data and layout do not belong together.
    """
    with all_ranks() as (runtime, ranks):
        measured = measure(config, runtime, ranks)
        if runtime.is_main:
            _print(measured, as_json=config.json)
    return 0


@dataclass(frozen=True)
class Measured:
    """path: what was read. losses: for each held-out source, in nats per counted token. bits_per_byte: the same loss per
    byte of text."""

    path: Path
    losses: dict[str, float]
    bits_per_byte: dict[str, float]


def measure(config: EvaluateConfig, runtime: Runtime, ranks: Ranks) -> Measured:
    """The losses of `config.checkpoint` on the held-out files, the same on every rank. Collective."""
    ranks.attempt("check the config", lambda: config.validate(runtime.world_size))
    set_threads(config.threads)
    weights = open_weights(config.checkpoint, ranks, more=SCALES)
    read = ranks.attempt("open the data", lambda: _held_out(config, weights, runtime))
    ranks.attempt(
        "check the layout", lambda: check_layout(weights.config, config.parallel, seq_len=config.data.seq_len)
    )
    mesh = build_grid(config.parallel, config.engine, world_size=runtime.world_size, device=runtime.device)
    dtype = config.precision.dtype
    objective, _ = ranks.attempt(
        "read the weights",
        lambda: assemble(
            weights.config,
            mesh=mesh,
            recipe=Recipe(config.parallel, config.precision),
            fill=from_tensors(weights.tensors),
            wrap=NextToken,
            distribute=config.engine.distribute(mesh, dtype),
        ),
    )
    objective.eval()
    ranks.attempt("read the scales", lambda: compute_as_trained(objective, config.precision, weights))
    losses = {}
    for name, source in read.sources.items():
        batches = validation_batches(
            source,
            windows=read.windows,
            micro_batch_size=config.micro_batch_size,
            rank=mesh.data_parallel_rank,
            ranks=mesh.data_parallel_size,
        )
        losses[name] = mean_loss(objective, map(mesh.place, batches), dtype, runtime=runtime)
    return Measured(weights.path, losses, bits_per_byte(losses, read.bytes_per_token))


def compute_as_trained(objective: NextToken, precision: Precision, weights: Weights) -> None:
    """Give FP8 layers the scales and the rung of the run. weights: opened with more=SCALES.

    Raises ValueError where delayed scaling has no scale for a layer.
    """
    numerics = numerics_of(objective.decoder)
    for name, tensor in numerics.tensors().items():
        kind, layer = name.split(".", 1)
        if kind not in SCALES:
            continue
        source = weights.more.get(kind)
        if source is None or layer not in source.names():
            raise ValueError(
                f"precision={precision.name}: {weights.path} holds no scale of {layer}, which training would have found; set "
                "precision=fp8_current, which needs none, or precision=bf16"
            )
        tensor.copy_(source.read(layer, [0], list(tensor.shape)))
    Ladder(numerics, recipe=precision.name, after=precision.fallback_after).load_state(weights.manifest or {})


def _held_out(config: EvaluateConfig, weights: Weights, runtime: Runtime) -> HeldOut:
    """The held-out sources. Raises ValueError when there are none, or they do not belong to the model."""
    read = held_out(config.data, data_tokenizer(config.checkpoint, config.data, weights, runtime))
    if not read.sources:
        raise ValueError("data: no source has a `validation` file; name one for at least one source")
    return read


def data_tokenizer(checkpoint: str, data: DataConfig, weights: Weights, runtime: Runtime) -> TokenizerIdentity:
    """The tokenizer of `data`, which is built first if it is the sample corpus.

    Raises ValueError when `data` names nothing, or does not belong to the model at `checkpoint`.
    """
    if not data.groups:
        raise ValueError(f"checkpoint={checkpoint} does not say what data it was trained on; give data=<a group>")
    data.validate()
    if data.sample_corpus and not Path(data.tokenizer).exists():
        if weights.manifest is None:
            raise ValueError(
                f"data=sample is not built yet, and {checkpoint} was not trained on it; give data=<a group of your own>, "
                "or build it with `make smoke`"
            )
        prepare_data(data, vocab_size=weights.config.vocab_size, report=print if runtime.is_main else None)
    tokenizer = open_tokenizer(data)
    check_vocabulary(weights.config, tokenizer)
    trained_with = weights.tokenizer_fingerprint
    if trained_with not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"{checkpoint} was trained with tokenizer {trained_with}, but data.tokenizer={data.tokenizer} is "
            f"{tokenizer.fingerprint}: losses would mean nothing; tokenize the data with the model's tokenizer"
        )
    return tokenizer


@torch.no_grad()
def mean_loss(objective: NextToken, batches: Iterable[Batch], dtype: torch.dtype, *, runtime: Runtime) -> float:
    """Mean loss in nats over the counted tokens of one source, summed up in the order of `Trainer.validate`. batches: placed."""
    sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    for batch in batches:
        with numerics_of(objective.decoder).forward_only(), computing(dtype, objective):
            loss = objective(batch)
        sums += torch.stack([loss.total.double(), loss.tokens.double()])
    total, tokens = runtime.sum(sums).tolist()
    return total / max(tokens, 1.0)


def _print(measured: Measured, *, as_json: bool) -> None:
    losses, bits = measured.losses, measured.bits_per_byte
    if as_json:
        print(json.dumps({"checkpoint": str(measured.path), "val_loss": losses, "bits_per_byte": bits}))
        return
    table = Table(title=str(measured.path))
    for column in ("source", "loss", "perplexity", "bits per byte"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for source, loss in losses.items():
        table.add_row(source, f"{loss:.4f}", perplexity(loss), number(bits.get(source)))
    Console().print(table)


register_choice("checkpoint", {}, group="data")  # what --help shows: no checkpoint is named there
register_choice("checkpoint", PrecisionConfig(), group="precision")
