"""Bytes that a transformer block keeps for its backward pass, by layout, recompute mode and precision.

    python benchmarks/activations.py [--length 256] [--micro-batch 1] [--tp 8]

The block is that of configs/model/nemotron4_15b.yaml at an eighth of its width. Each number is what four blocks keep on rank 0
minus what two blocks keep, for one block, divided by the B x T x D elements of the whole residual stream. It does not grow with
T: attention is fused and keeps no scores.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_lite.models.config import AttentionConfig, MlpConfig, ModelConfig, RopeConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.layers import TensorParallel
from megatron_lite.parallel.mesh import RECOMPUTE_MODES
from megatron_lite.parallel.plans import apply_plan, decoder_plan
from megatron_lite.parallel.recompute import recompute_layer
from megatron_lite.precision.dtypes import DTYPES

HEADS, KV_HEADS, WIDTH = 48, 8, 768


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--tp", type=int, default=8)
    options = parser.parse_args()
    table = Table(title=f"bytes kept for backward by a block, for each element of B x T x D (T={options.length})")
    for column in ("layout", "recompute", *DTYPES):
        table.add_column(column, justify="right" if column in DTYPES else "left")
    for layout, cells in measure(options).items():
        for mode, by_dtype in cells.items():
            table.add_row(layout, mode, *(f"{cell:.1f}" for cell in by_dtype))
    Console(width=120).print(table)


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Layout -> recompute mode -> bytes by precision, on rank 0. The other ranks are made up: their data does not matter here."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=options.tp)
    group = dist.group.WORLD
    assert group is not None
    layouts = {
        "one process": None,
        f"tp {options.tp}": TensorParallel(0, options.tp, group),
        f"tp {options.tp}, sequence parallel": TensorParallel(0, options.tp, group, sequence_parallel=True),
    }
    shape = (options.micro_batch, options.length)
    found = {
        layout: {
            mode: [bytes_per_element(tp, mode, dtype, shape) for dtype in DTYPES.values()] for mode in RECOMPUTE_MODES
        }
        for layout, tp in layouts.items()
    }
    dist.destroy_process_group()
    return found


def bytes_per_element(tp: TensorParallel | None, mode: str, dtype: torch.dtype, shape: tuple[int, int]) -> float:
    """What one block keeps, in bytes for each element of the whole residual stream."""
    growth = kept(tp, mode, dtype, blocks=4, shape=shape) - kept(tp, mode, dtype, blocks=2, shape=shape)
    return growth / 2 / (shape[0] * shape[1] * WIDTH)


def kept(tp: TensorParallel | None, mode: str, dtype: torch.dtype, *, blocks: int, shape: tuple[int, int]) -> int:
    """Bytes that the forward pass of `blocks` blocks allocates and that are still there when it is done."""
    config = ModelConfig(
        family="nemotron4", num_layers=blocks, hidden_size=WIDTH, vocab_size=128, max_seq_len=shape[1],
        attention=AttentionConfig(heads=HEADS, kv_heads=KV_HEADS), mlp=MlpConfig(ffn_size=4 * WIDTH),
        rope=RopeConfig(fraction=0.5),
    )  # fmt: skip
    decoder = Decoder(config).to(dtype)
    if tp is not None:
        apply_plan(decoder, decoder_plan(decoder), tp)
    for parameter in decoder.parameters():
        torch.nn.init.zeros_(parameter)  # the values do not matter
    for layer in decoder.layers:
        recompute_layer(layer, mode)
    context = decoder.context(torch.zeros(shape, dtype=torch.int64))
    length = shape[1] // tp.size if tp is not None and tp.sequence_parallel else shape[1]
    x_BTD = torch.randn(shape[0], length, WIDTH).to(dtype).requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        for layer in decoder.layers:
            x_BTD, _ = layer(x_BTD, context)
    return sum(event.nbytes() for event in watch.profiler.kineto_results.events() if event.name() == "[memory]")


if __name__ == "__main__":
    main()
