"""A plan: what one layout costs on one type of GPU. Nothing in it is measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_lite.hardware import Gpu
from megatron_lite.planner.job import Job
from megatron_lite.planner.memory import OUTSIDE, Memory, memory
from megatron_lite.planner.time import DEFAULT, Assumptions, Clock, StepTime
from megatron_lite.planner.traffic import Flow, flows
from megatron_lite.planner.work import units_of


@dataclass(frozen=True)
class Plan:
    """memory: of one rank. step: of all. flows: what one rank sends in a step. flops_per_token: as training counts them."""

    job: Job
    gpu: Gpu
    memory: Memory
    step: StepTime
    flows: list[Flow]
    flops_per_token: float
    assumptions: Assumptions = DEFAULT

    @property
    def fits(self) -> bool:
        """Whether the GPU has the memory, with what is outside of torch's allocator."""
        return self.memory.total + OUTSIDE <= self.gpu.memory

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.job.tokens / self.step.seconds

    def bill(self, tokens: int, price: float | None) -> Bill:
        """For a run of `tokens` at this batch and speed. price: of a GPU for an hour."""
        seconds = tokens / self.tokens_per_second
        hours = seconds / 3600 * self.job.gpus
        return Bill(tokens, seconds / 86400, hours, None if price is None else hours * price)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: bytes, seconds and bytes/s."""
        job = self.job
        return {
            "gpu": self.gpu.name,
            "gpus": job.gpus,
            **layout_of(job),
            "memory": {**self.memory.parts, "outside": OUTSIDE},
            "memory_of_gpu": self.gpu.memory,
            "fits": self.fits,
            "flops_per_token": self.flops_per_token,
            "step_seconds": self.step.seconds,
            "step_parts": self.step.parts,
            "mfu": self.step.mfu,
            "tokens_per_second": self.tokens_per_second,
            "traffic": [asdict(flow) for flow in self.flows],
            "assumptions": asdict(self.assumptions),
            "measured": False,
        }


@dataclass(frozen=True)
class Bill:
    """What a whole run costs. cost: in the currency of the price; None without one."""

    tokens: int
    days: float
    gpu_hours: float
    cost: float | None


def plan(job: Job, gpu: Gpu, assumptions: Assumptions = DEFAULT) -> Plan:
    """The plan of `job`. Raises ValueError when model, batch or precision do not go with the layout or the GPU."""
    units, clock = units_of(job), Clock(gpu, assumptions)
    step = clock.step(job, units)
    return Plan(job, gpu, memory(job), step, flows(job, units, gpu.node), clock.flops_per_token(job), assumptions)


def layout_of(job: Job) -> dict[str, Any]:
    """The settings that make the layout, as overrides name them."""
    settings: dict[str, Any] = {f"parallel.{key}": getattr(job.parallel, key) for key in _PARALLEL}
    key = "zero_stage" if job.engine.name == "deepspeed" else "shard"
    return {
        **settings,
        "engine": job.engine.name,
        f"engine.{key}": getattr(job.engine, key),
        "train.micro_batch_size": job.micro_batch,
    }


def overrides_of(job: Job) -> str:
    """`layout_of` as typed."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in layout_of(job).items())


_PARALLEL = ("tp", "cp", "sequence_parallel", "dp_replicate", "recompute")
