"""`mlite plan`: the size of a model, and its shapes on a tensor-parallel rank. Builds it on the meta device, without memory.

python -m megatron_lite plan model=nemotron_nano2_12b
python -m megatron_lite plan model=nemotron4_15b parallel.tp=8
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import prod

import torch
from rich.console import Console
from rich.table import Table

from megatron_lite.commands.command import run_command
from megatron_lite.models.cache_size import cache_bytes
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.flops import flops_per_token, parameter_count
from megatron_lite.models.layers import LAYER_TYPES
from megatron_lite.parallel.layers import ShardInfo, TensorParallel, shard_info
from megatron_lite.parallel.mesh import ParallelConfig
from megatron_lite.parallel.plans import apply_plan, check_divisible, decoder_plan


@dataclass
class PlanConfig:
    """`mlite plan`: a model and its tensor parallelism; other keys of `parallel` have no effect on it. seq_len: for the
    FLOPs per token."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    seq_len: int | None = None


def main() -> None:
    """Parse, count, exit."""
    run_command("plan", PlanConfig, "How large a model is, and what a tensor-parallel rank holds of it.", plan)


def plan(config: PlanConfig) -> int:
    """Print sizes and shapes. Raises ValueError when the model cannot be built or does not divide by `parallel.tp`."""
    model, tp = config.model, config.parallel.tp
    config.parallel.validate(world_size=tp * config.parallel.cp * config.parallel.dp_replicate)
    model.validate()
    check_divisible(model, tp=tp, sequence_parallel=config.parallel.sequence_parallel and config.parallel.cp == 1)
    seq_len = model.max_seq_len if config.seq_len is None else config.seq_len
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} must be at least 1")
    infos, local = shapes(model, tp=tp)
    total = parameter_count(model)
    vocabulary = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(f"{total:,} parameters, {total - vocabulary:,} without embedding and head", highlight=False)
    counts = Counter(model.symbols)
    layers = ", ".join(f"{count} {LAYER_TYPES[symbol].name}" for symbol, count in counts.items())
    console.print(f"{len(model.symbols)} layers: {layers}", highlight=False)
    flops = flops_per_token(model, seq_len)
    console.print(f"{flops:.4g} FLOPs to train on a token of a sequence of {seq_len:,}", highlight=False)
    held = cache_bytes(model, seq_len) / 2**20
    console.print(f"{held:,.1f} MiB of cache to generate a text of {seq_len:,} tokens in bf16", highlight=False)
    parameters = sum(map(prod, local.values()))
    console.print(
        f"{parameters:,} parameters on a rank with parallel.tp={tp}, vocabulary padding included", highlight=False
    )
    console.print(_table(model, infos, local))
    return 0


def shapes(model: ModelConfig, *, tp: int) -> tuple[dict[str, ShardInfo], dict[str, tuple[int, ...]]]:
    """(name -> where a rank's part is in the global parameter, name -> the part's shape), as training makes them."""
    with torch.device("meta"):
        decoder = Decoder(model)
    if tp > 1:
        # no group: nothing is computed
        apply_plan(decoder, decoder_plan(decoder), TensorParallel(0, tp, None))  # type: ignore[arg-type]
    return shard_info(decoder), {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}


def _table(model: ModelConfig, infos: dict[str, ShardInfo], local: dict[str, tuple[int, ...]]) -> Table:
    """One row a parameter; of each type of layer the first one."""
    first = {model.symbols.index(symbol): count for symbol, count in Counter(model.symbols).items()}
    table = Table()
    for column in ("parameter", "layers", "shape", "on a rank"):
        table.add_column(column)
    for name, info in infos.items():
        of_layer = name.startswith("layers.")
        index = int(name.split(".")[1]) if of_layer else None
        if index is None or index in first:
            times = "" if index is None else f"{first[index]} x"
            table.add_row(name, times, " x ".join(map(str, info.global_shape)), " x ".join(map(str, local[name])))
    return table
