"""What context parallelism sends, keeps and computes in a layer of each type, and in layers that share keys and values.

    python benchmarks/context.py [--cp 1 2 4] [--lengths 2048 8192]

One row of tokens without documents through forward and backward of a layer of 64 numbers a token, in fp32, on as many processes of this
machine. Everything is counted from what the profiler saw, and nothing depends on the machine.

    calls      collectives of a rank that sends anything, forward and backward
    KB sent    by the average rank; between brackets, by the one that sends most
    kept       bytes that a rank keeps for backward, as a share of what one process keeps
    balance    scores that the busiest rank computes, as a multiple of the average
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import profile

from megatron_lite.models.cache import KeyValue
from megatron_lite.models.config import AttentionConfig, MambaConfig, MlpConfig, ModelConfig
from megatron_lite.models.context import LayerContext
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.initialization import initialize_model_
from megatron_lite.parallel.plans import divide_sequences
from megatron_lite.parallel.sequence_slices import ContextParallel, cut

WIDTH, WINDOW, META_TOKENS = 64, 256, 16
ATTENTION = AttentionConfig(heads=4, kv_heads=2)
WINDOWED = AttentionConfig(heads=4, kv_heads=2, window=WINDOW, always_visible=META_TOKENS)


def _hymba(pattern: str, **settings: Any) -> ModelConfig:
    return ModelConfig(
        family="hymba", pattern=pattern, attention=replace(WINDOWED, **settings), meta_tokens=META_TOKENS, norm="rmsnorm",
        mamba=MambaConfig(version=1, heads=4, head_dim=16, state=16, dt_rank=8),
    )  # fmt: skip


LAYERS = {
    "attention": ModelConfig(family="nemotron_h", pattern="*", attention=ATTENTION),
    f"attention, window {WINDOW}": ModelConfig(family="nemotron_h", pattern="*", attention=WINDOWED, meta_tokens=META_TOKENS),
    "Mamba-2": ModelConfig(
        family="nemotron_h", pattern="M", attention=ATTENTION, mamba=MambaConfig(heads=4, head_dim=32, groups=2, state=32)
    ),
    f"Hymba, window {WINDOW}": _hymba("H"),
    "3 of these": _hymba("HHH"),
    "3 of these, shared keys": _hymba("HHH", kv_groups=[[0, 1, 2]]),
}  # fmt: skip
ATTENTION_KERNEL = "aten::_scaled_dot_product_flash_attention_for_cpu"
ALL_GATHER = "_c10d_functional::all_gather_into_tensor"
SENT = {  # collective -> which of its inputs is what a rank sends
    "c10d::alltoall_base_": 1,  # functional ones come here too
    ALL_GATHER: 0,  # to each of the other ranks
}


@dataclass
class Rank:
    """What one rank did in one layer."""

    calls: int
    bytes_sent: int
    bytes_kept: int
    scores: float


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    options = parser.parse_args()
    for cp, length in itertools.product(options.cp, options.lengths):
        if cp < 1 or length < 1 or length % (2 * cp):
            parser.error(f"--lengths {length} must be a multiple of 2 x --cp {cp}, both at least 1")
    table = Table(title=f"a layer of {WIDTH} numbers a token, fp32")
    for column in ("layer", "tokens", "cp", "calls", "KB sent", "kept", "balance"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    cases = [(name, length) for name in LAYERS for length in options.lengths]
    alone = [layer_on(LAYERS[name], None, length) for name, length in cases]
    by_size = {size: on_ranks(size, cases) if size > 1 else [alone] for size in options.cp}
    for index, (name, length) in enumerate(cases):
        for size, ranks in by_size.items():
            counts = [rank[index] for rank in ranks]
            table.add_row(name, f"{length:,}", str(size), *cells(counts, alone[index]))
    Console(width=120).print(table)


def cells(ranks: list[Rank], whole: Rank) -> list[str]:
    """One row of the table."""
    sent, scores = [rank.bytes_sent / 1e3 for rank in ranks], [rank.scores for rank in ranks]
    mean = sum(scores) / len(scores)
    return [
        str(max(rank.calls for rank in ranks)),
        f"{sum(sent) / len(sent):,.0f} ({max(sent):,.0f})",
        f"{max(rank.bytes_kept for rank in ranks) / whole.bytes_kept:.3f}",
        f"{max(scores) / mean:.2f}" if mean else "",
    ]


def on_ranks(size: int, cases: list[tuple[str, int]]) -> list[list[Rank]]:
    """What each of `size` ranks does in each case."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_on_rank, (size, cases, folder), nprocs=size)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]
    return [[Rank(**counts) for counts in rank] for rank in found]


def _on_rank(rank: int, size: int, cases: list[tuple[str, int]], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    cp = ContextParallel(rank, size, dist.group.WORLD)
    found = [vars(layer_on(LAYERS[name], cp, length)) for name, length in cases]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def layer_on(config: ModelConfig, cp: ContextParallel | None, length: int) -> Rank:
    """Forward and backward of the layers of a config, which is one of `LAYERS`; cp None: in one process."""
    config.hidden_size, config.vocab_size, config.max_seq_len = WIDTH, 128, length
    config.mlp = MlpConfig(ffn_size=WIDTH)
    decoder = Decoder(config)
    initialize_model_(decoder, 0)
    prefix = config.meta_tokens
    x_BTD, positions_BT = torch.randn(1, length, WIDTH), torch.arange(prefix, prefix + length)[None]
    if cp is not None:
        divide_sequences(decoder, cp)
        x_BTD, positions_BT = cut(x_BTD, cp), cut(positions_BT, cp)
    x_BTD = torch.cat([torch.randn(1, prefix, WIDTH), x_BTD], dim=1).requires_grad_()
    context = LayerContext(torch.cat([torch.arange(prefix)[None], positions_BT], dim=1), prefix=prefix)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with profile(record_shapes=True) as watch:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y_BTD = through_layers(decoder, x_BTD, context)
        y_BTD.square().sum().backward()
    others = 0 if cp is None else cp.size - 1
    sent = [
        math.prod(event.input_shapes[SENT[event.name]]) * (others if event.name == ALL_GATHER else 1)
        for event in watch.events()
        if event.name in SENT
    ]
    sent = [numbers for numbers in sent if numbers]
    return Rank(len(sent), 4 * sum(sent), sum(kept.values()), scores(watch))


def through_layers(decoder: Decoder, x_BTD: Tensor, context: LayerContext) -> Tensor:
    """The layers alone, without embedding and final norm."""
    made: dict[int, KeyValue] = {}
    for index, (spec, layer) in enumerate(zip(decoder.specs, decoder.layers)):
        of_layer = context if spec.kv_from is None else replace(context, kv=made[spec.kv_from])
        x_BTD, kv = layer(x_BTD, of_layer)
        if kv is not None:
            made[index] = kv
    return x_BTD


def scores(watch: profile) -> float:
    """Scores of the forward pass's attention kernels."""
    total = 0.0
    for event in watch.events():
        if event.name == ATTENTION_KERNEL:
            query, key, causal = *event.input_shapes[:2], event.concrete_inputs[4]
            total += math.prod(query[:3]) * key[2] * (0.5 if causal else 1.0)
    return total


if __name__ == "__main__":
    main()
