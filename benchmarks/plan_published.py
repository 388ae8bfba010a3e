"""What `mlite plan` predicts for published trainings, beside what they report.

    python -m benchmarks.plan_published

The planner has one fitted constant, from the first row. The others are predicted with it, as described by the layout and the settings of
ours that come nearest to theirs; what has no counterpart here is said in docs/plan.md, with the figures that cannot be predicted.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_lite.hardware import Gpu, gpu_named
from megatron_lite.planner.job import Job
from megatron_lite.planner.time import DEFAULT, Assumptions, Clock
from megatron_lite.planner.work import units_of
from megatron_lite.training.config import compose_run
from megatron_lite.training.planning import job_of

H100, H200 = gpu_named("h100"), gpu_named("h200")
# Memory of 2.4 TB/s and a limit of 500 W: their page says that its peak lies between those of the SXM and the NVL version. The middle.
H100_500W = replace(H100, name="h100 at 500 W", bandwidth=2.4e12, bf16=912e12, fp8=1825e12)

_LLAMA = [
    "model=llama3p2_3b",
    "model.tie_embeddings=false",
    "data.seq_len=8192",
    "data.reset_attention=false",
    "train.max_steps=1",
]
LLAMA_8B = [
    *_LLAMA,
    "model.num_layers=32",
    "model.hidden_size=4096",
    "model.attention.heads=32",
    "model.mlp.ffn_size=14336",
]
LLAMA_70B = [
    *_LLAMA,
    "model.num_layers=80",
    "model.hidden_size=8192",
    "model.attention.heads=64",
    "model.mlp.ffn_size=28672",
]
NEMOTRON = ["experiment=nemotron4_15b", "train.batch_ramp=[]"]
_FUSED_ATTENTION = (
    0.55  # of the peak, forward and backward: FlashAttention-3 on an H100 (arXiv 2407.08608), and cuDNN's kernel
)
_COMPILED, _SELECTIVE, _FP8 = "parallel.compile=true", "parallel.recompute=selective", "precision=fp8_current"


@dataclass(frozen=True)
class Published:
    """One figure. batch: samples of a micro-batch and of a step. speed: tokens a second and GPU. products_again: the part of the products
    of the forward pass that run again in backward, beside what the mode of recomputation here runs again."""

    name: str
    settings: list[str]
    gpus: int
    gpu: Gpu
    batch: tuple[int, int]
    speed: float
    products_again: float = 0.0

    def job(self) -> Job:
        """What is planned."""
        micro_batch, global_batch = self.batch
        sizes = [f"train.micro_batch_size={micro_batch}", f"train.global_batch_size={global_batch}"]
        return job_of(compose_run([*self.settings, *sizes]), self.gpus)


def _nemotron(ranks: int, seconds: float) -> Published:
    gpus, batch = 8 * ranks, 4 * ranks
    return Published(f"Nemotron-4 15B, DP {ranks}", NEMOTRON, gpus, H100, (4, batch), 4096 * batch / seconds / gpus)


def _torchtitan(name: str, settings: list[str], gpus: int, gpu: Gpu, speed: float) -> Published:
    """Llama 3.1 8B with two samples a GPU; its selective checkpointing runs every second product again."""
    words = [*LLAMA_8B, _SELECTIVE, *settings]
    return Published(f"torchtitan 8B, {gpus} {gpu.name}{name}", words, gpus, gpu, (2, 2 * gpus), speed, 0.5)


_70B = [*LLAMA_70B, _FP8, _COMPILED, "parallel.tp=8", "parallel.sequence_parallel=true", "parallel.recompute=full"]
# arXiv 2402.16819, table 2; pages of the repositories pytorch/torchtitan (benchmarks/llama3_h100_202412_torchtitan.md,
# llama3-8b_h200_202506_trainy-whitefiber.md) and NVIDIA-NeMo/Megatron-Bridge (docs/performance-summary.md, 25.11).
PUBLISHED = (
    _nemotron(96, 0.57),  # the row of the fit
    _nemotron(192, 0.58),
    _nemotron(288, 0.64),
    Published("Megatron Bridge 8B, FP8", [*LLAMA_8B, _FP8, _COMPILED], 8, H100, (1, 128), 14451),
    _torchtitan("", ["precision=bf16"], 8, H100_500W, 5762),
    _torchtitan(", compiled", ["precision=bf16", _COMPILED], 8, H100_500W, 6667),
    _torchtitan(", compiled, FP8", [_FP8, _COMPILED], 8, H100_500W, 8532),
    _torchtitan("", ["precision=bf16"], 128, H100_500W, 5605),
    _torchtitan(", compiled", ["precision=bf16", _COMPILED], 128, H100_500W, 6514),
    _torchtitan(", compiled, FP8", [_FP8, _COMPILED], 128, H100_500W, 8380),
    Published("torchtitan 70B, TP 8, compiled, FP8", _70B, 256, H100_500W, (16, 512), 829),
    _torchtitan(", compiled, FP8", [_FP8, _COMPILED], 32, H200, 10938),
    _torchtitan(", compiled, FP8", [_FP8, _COMPILED], 64, H200, 10753),
)


def predicted(row: Published, assumptions: Assumptions = DEFAULT) -> float:
    """Tokens a second and GPU."""
    job, clock = row.job(), Clock(row.gpu, assumptions)
    step = clock.step(job, units_of(job))
    seconds = step.seconds
    if row.products_again:
        once, twice = (_products(job, clock, mode) for mode in ("none", "full"))
        seconds += once + row.products_again * (twice - once) - step.parts["matrix products"]
    return job.tokens / seconds / job.gpus


def _products(job: Job, clock: Clock, recompute: str) -> float:
    job = replace(job, parallel=replace(job.parallel, recompute=recompute))
    return clock.step(job, units_of(job)).parts["matrix products"]


def fitted(row: Published) -> float:
    """The part of their peak at which matrix products must run for the speed of `row`, by bisection."""
    job, low, high = row.job(), 0.1, 1.0
    units = units_of(job)
    for _ in range(30):
        middle = (low + high) / 2
        seconds = Clock(row.gpu, replace(DEFAULT, matmul=middle)).step(job, units).seconds
        low, high = (middle, high) if job.tokens / seconds / job.gpus < row.speed else (low, middle)
    return (low + high) / 2


def predictions() -> dict[str, float]:
    """Name -> tokens a second and GPU, of every figure."""
    return {row.name: predicted(row) for row in PUBLISHED}


def error(row: Published, speed: float) -> float:
    """In percent."""
    return 100 * (speed / row.speed - 1)


def lines(speeds: dict[str, float]) -> Iterator[str]:
    """The table, and what its errors are. The first row is that of the fit."""
    yield "| published | tokens/s | planned | error |"
    yield "|---|---|---|---|"
    for row in PUBLISHED:
        off = "fitted" if row is PUBLISHED[0] else f"{error(row, speeds[row.name]):+.1f} %"
        yield f"| {row.name} | {row.speed:,.0f} | {speeds[row.name]:,.0f} | {off} |"
    errors = {row.name: error(row, speeds[row.name]) for row in PUBLISHED[1:]}
    worst = max(PUBLISHED[1:], key=lambda row: abs(errors[row.name]))
    median = statistics.median(map(abs, errors.values()))
    yield ""
    yield f"{len(errors)} predicted: median error {median:.1f} %, largest {errors[worst.name]:+.1f} % ({worst.name})."
    faster = predicted(worst, replace(DEFAULT, attention=_FUSED_ATTENTION))
    yield f"With attention at {_FUSED_ATTENTION} of the peak the latter would be {faster:,.0f} tokens/s, {error(worst, faster):+.1f} %."


def main() -> None:
    """Print the table, and what the fit gives."""
    for line in lines(predictions()):
        print(line)
    print(f"Matrix products run at {fitted(PUBLISHED[0]):.3f} of their peak in the first row; used: {DEFAULT.matmul}.")


if __name__ == "__main__":
    main()
