"""Speed and memory of training on one GPU, by precision.

    python benchmarks/throughput.py model [--precision bf16 fp8_current]    a transformer of 1.0 billion parameters, whole steps
    python benchmarks/throughput.py layer [--precision ...]                 one block of Nemotron-4 15B, forward and backward
    python benchmarks/throughput.py layer --device cpu --tiny               the same lines on a CPU, for a look at the output

Tokens are random, in sequences of 4,096. Each time is the median of `--steps` steps, after `--warmup` more. MFU counts as the training
log does (`models/flops.py`), against the data sheet's bf16 rate in every row, so that rows of one table compare: a layer in FP8
can exceed what bf16 could reach. A precision that this machine does not have gets a row with the reason.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_lite.engine.fsdp import FsdpConfig, computing
from megatron_lite.hardware import device_peak_flops
from megatron_lite.models.config import AttentionConfig, MlpConfig, ModelConfig, RopeConfig
from megatron_lite.models.flops import flops_per_token, parameter_count
from megatron_lite.objectives.next_token import NextTokenConfig
from megatron_lite.parallel.mesh import ParallelConfig
from megatron_lite.precision.recipes import precision_class
from megatron_lite.training.build import build_engine, build_grid
from megatron_lite.training.config import RunConfig

PRECISIONS = ["bf16", "fp8_delayed", "fp8_current", "fp8_block", "mxfp8"]


def nemotron4(*, blocks: int, hidden: int, heads: int, kv_heads: int, vocabulary: int, length: int) -> ModelConfig:
    """Nemotron-4's architecture in another size; the 15B model has hidden=6144, heads=48, kv_heads=8."""
    return ModelConfig(
        family="nemotron4",
        num_layers=blocks,
        hidden_size=hidden,
        vocab_size=vocabulary,
        max_seq_len=length,
        attention=AttentionConfig(heads=heads, kv_heads=kv_heads, head_dim=128),
        rope=RopeConfig(fraction=0.5),
        mlp=MlpConfig(ffn_size=4 * hidden, activation="squared_relu"),
        norm="layernorm1p",
        init_std=0.0134,
    )


MODELS = {
    "model": nemotron4(blocks=20, hidden=2048, heads=16, kv_heads=8, vocabulary=32_000, length=4096),
    "layer": nemotron4(blocks=1, hidden=6144, heads=48, kv_heads=8, vocabulary=128, length=4096),
}
TINY = nemotron4(blocks=1, hidden=256, heads=2, kv_heads=2, vocabulary=128, length=64)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(MODELS))
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=PRECISIONS)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small model, for a CPU")
    options = parser.parse_args()
    config = TINY if options.tiny else MODELS[options.what]
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    table = Table(
        title=f"{options.what}: {parameter_count(config) / 1e6:,.0f} million parameters, {options.micro_batch} x "
        f"{config.max_seq_len} tokens, {name}"
    )
    for column in ("precision", "ms", "tokens/s", "TFLOP/s", "MFU", "against the first", "peak GB"):
        table.add_column(column, justify="left" if column == "precision" else "right")
    first = 0.0
    for precision in options.precision:
        try:
            seconds, peak_bytes = measure(precision, config, device, options)
        except (ValueError, torch.OutOfMemoryError) as error:
            table.add_row(precision, "-", "-", "-", "-", "-", "-")
            print(f"{precision}: {str(error).splitlines()[0]}")
            continue
        first = first or seconds
        table.add_row(precision, *cells(config, device, options, seconds), f"{first / seconds:.2f}", peak_bytes)
    Console(width=120).print(table)


def cells(config: ModelConfig, device: torch.device, options: argparse.Namespace, seconds: float) -> list[str]:
    """ms, tokens/s, TFLOP/s and MFU."""
    tokens = options.micro_batch * config.max_seq_len
    rate = flops_per_token(config, config.max_seq_len) * tokens / seconds
    peak = device_peak_flops(device, "bf16").flops
    mfu = f"{rate / peak:.1%}" if peak else "-"
    return [f"{seconds * 1e3:.1f}", f"{tokens / seconds:,.0f}", f"{rate / 1e12:.3g}", mfu]


def measure(
    precision: str, config: ModelConfig, device: torch.device, options: argparse.Namespace
) -> tuple[float, str]:
    """(median seconds of a step, or of a forward and backward; the most GB allocated). Raises ValueError if it cannot be had."""
    run = RunConfig(
        model=replace(config),
        precision=precision_class(precision)(precision),
        parallel=ParallelConfig(),
        engine=FsdpConfig(shard="none"),
        objective=NextTokenConfig(),
    )
    run.precision.validate()
    engine: Any = build_engine(run, build_grid(run.parallel, run.engine, world_size=1, device=device))
    words = torch.randint(0, config.vocab_size, (options.micro_batch, config.max_seq_len + 1), device=device)
    tokens, targets = words[:, :-1].contiguous(), words[:, 1:].contiguous()
    batch = {"tokens": tokens, "targets": targets, "loss_mask": torch.ones_like(targets, dtype=torch.bool)}

    def step() -> None:
        engine.train_step([batch], lr=1e-4)

    def forward_and_backward() -> None:
        with (
            engine.numerics.step(keep_weights=True),
            engine.numerics.micro_batch(),
            computing(engine.dtype, engine.objective),
        ):
            engine.objective(batch).total.backward()

    action = step if options.what == "model" else forward_and_backward
    seconds = timed(action, device, steps=options.steps, warmup=options.warmup)
    peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if device.type == "cuda" else "-"
    return seconds, peak


def timed(action: Callable[[], None], device: torch.device, *, steps: int, warmup: int) -> float:
    """Median seconds, with the device idle before and after each."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(warmup + steps):
        _wait(device)
        start = time.perf_counter()
        action()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
