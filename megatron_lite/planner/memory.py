"""Bytes of one rank by part, at the moment of a training step when it holds most.

    weights        the parameters as they are kept between two steps: fp32 shards (FSDP2), or what DeepSpeed computes with
    gathered       weights as a unit computes with them, for as long as they are gathered or cast
    optimizer      Adam's moments, and DeepSpeed's fp32 master weights
    gradients      of this rank's shard, and until they are reduced of the whole tensor-parallel shard
    activations    what layers keep for backward, and the most that one layer's forward or backward needs beside it
    loss           the same of final norm, head and loss: logits of a chunk of tokens, gradients of states and head
    communication  buffers of gathers and reductions
    teacher        of a distillation: its shards, its forward pass, its states and head until the loss is there
    FP8 weights    where weights stay in memory for a step, their codes do, too

Local shapes come from training's own plan on the meta device, activations from training's own forward and backward (`trace`), the
order of events from the engines (`fsdp_step`, `zero_step`). Not counted: what lies outside of torch's allocator (`OUTSIDE`), fragments
of that allocator, and what a kernel takes and gives back inside of itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch

from megatron_lite.engine.deepspeed import BUCKET
from megatron_lite.models.config import ModelConfig
from megatron_lite.planner.fsdp_step import FP32, Sharding, forward_pass, fsdp_step, undivided_step
from megatron_lite.planner.job import Job
from megatron_lite.planner.passes import NO_TEACHER, Frozen, in_forward
from megatron_lite.planner.passes import forward as run_forward
from megatron_lite.planner.shapes import local_shapes
from megatron_lite.planner.timeline import Timeline
from megatron_lite.planner.trace import Unit, traced_units
from megatron_lite.planner.zero_step import Zero, zero_step

# CUDA context, NCCL's communicators and cuBLAS's workspace on a GPU: an estimate, not measured here.
OUTSIDE = 4 * 10**9
# How far the plan may be off: `benchmarks/planned_memory.py`, without ZeRO.
ERROR = 0.1


@dataclass(frozen=True)
class Memory:
    """parts: bytes by part at the fullest moment of a step, without those that are 0. moment: what is going on then.

    staying: what a rank holds between two steps. gradients: bytes when the update begins. host: bytes in the memory of the CPU where
    something is offloaded.
    """

    parts: dict[str, int]
    moment: str
    staying: dict[str, int]
    gradients: int
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Traced:
    """What the passes of a micro-batch hold, unit by unit: of the model, and of its teacher."""

    units: list[Unit]
    teacher: list[Unit]

    @classmethod
    def of(cls, job: Job, device: str) -> Traced:
        """Raises ValueError when a model does not divide by the layout's degrees."""
        teacher = [] if job.frozen is None else traced_units(job.frozen, device=device, frozen=True)
        return cls(traced_units(job, device=device), teacher)


def memory(job: Job, *, device: str = "cuda", traced: Traced | None = None) -> Memory:
    """What a rank of `job` holds. device: cuda, or cpu for a run there, whose attention and chunks of logits are others. traced: of a
    job with the same passes; None: they are run.

    Raises ValueError when the model does not divide by the layout's degrees.
    """
    traced = traced or Traced.of(job, device)
    units, teacher = traced.units, _teacher(job, traced.teacher)
    staying = _staying(job, units, device) | {"teacher": teacher.staying}
    timeline = Timeline(staying)
    if job.engine.name == "deepspeed":
        zero_step(timeline, units, _zero(job, device), teacher)
    elif job.gpus == 1:
        undivided_step(timeline, units, _sharding(job), teacher)
    else:
        fsdp_step(timeline, units, _sharding(job), teacher)
    parts = dict(timeline.fullest)
    parts["activations"] = parts.get("activations", 0) + parts.pop("stream", 0)  # what travels between units
    return Memory(
        {part: size for part, size in parts.items() if size},
        timeline.moment,
        {part: size for part, size in staying.items() if size},
        timeline.held["gradients"],
        _host(job, units),
    )


def memory_at_least(job: Job, parameters: int) -> int:
    """Bytes that a rank of `job`, whose model has so many parameters, holds at least, whatever engine and recompute mode: its part of
    weights and moments, and the input of every layer. Found at once, where `memory` runs the passes."""
    degrees, parallel = job.degrees, job.parallel
    kept = 0 if job.offloads else 3 * FP32 * parameters // job.gpus
    tokens = (job.model.meta_tokens + job.seq_len // degrees.cp) // (degrees.tp if parallel.sequence_parallel else 1)
    return kept + len(job.model.symbols) * job.micro_batch * tokens * job.model.hidden_size * _width(job)


def _teacher(job: Job, traced: list[Unit]) -> Frozen:
    """What the teacher holds. FSDP2 shards it over the ranks that divide the student, a layer is gathered for its forward."""
    if job.frozen is None:
        return NO_TEACHER
    *units, head = traced
    sharding = replace(_sharding(job.frozen), shard="full", accumulates=False, offload=False)
    alone = Timeline({})
    if job.gpus == 1:  # nothing is gathered
        for unit in in_forward(alone, units):
            run_forward(alone, unit)
    else:
        forward_pass(alone, units, sharding)
    return Frozen(
        staying=sum(sharding.kept(unit) for unit in (*units, head)),
        computing=sum(alone.fullest.values()),
        waiting=alone.held["stream"] + alone.held["gathered"],
        head=0 if job.gpus == 1 else sharding.gathered(head),
    )


def _staying(job: Job, units: list[Unit], device: str) -> dict[str, int]:
    ranks = job.degrees.dp_shard * job.degrees.cp
    numbers, offloads = sum(unit.numbers for unit in units), job.offloads and device != "cpu"
    codes = {"FP8 weights": sum(unit.lasting_codes for unit in units)}
    if job.engine.name == "deepspeed":
        zero, part = _zero(job, device), -(-numbers // ranks)
        staying = {
            "weights": zero.width * (part if zero.stage == 3 else numbers),
            "optimizer": 0 if offloads else 3 * FP32 * part,
        }
        if zero.keeps_gradients:
            staying["gradients"] = FP32 * numbers
        if zero.stage == 3:
            staying |= {"gradients": zero.partition(numbers), "communication": zero.bucket_bytes}
        return staying | codes
    part = sum(unit.shard(ranks) for unit in units)
    return codes | ({} if offloads else {"weights": FP32 * part, "optimizer": 2 * FP32 * part})


def _host(job: Job, units: list[Unit]) -> int:
    """16 bytes a number of the shard with FSDP2 (weights, moments, gradients) and with DeepSpeed (master weights instead)."""
    ranks = job.degrees.dp_shard * job.degrees.cp
    return 4 * FP32 * sum(unit.shard(ranks) for unit in units) if job.offloads else 0


def _sharding(job: Job) -> Sharding:
    return Sharding(
        job.shard,
        job.degrees.dp_shard * job.degrees.cp,
        _width(job),
        tied=job.model.tie_embeddings,
        accumulates=job.accumulates,
        offload=job.offloads,
    )


def _zero(job: Job, device: str) -> Zero:
    numbers = _all_numbers(job.model)
    return Zero(
        _stage(job),
        job.degrees.dp_shard * job.degrees.cp,
        _width(job),
        bucket=min(BUCKET, numbers + numbers % 2),
        overlaps=device != "cpu",
        accumulates=job.accumulates,
        offload=job.offloads,
    )


def _all_numbers(model: ModelConfig) -> int:
    return sum(prod(info.global_shape) for info in local_shapes(model, tp=1)[0].values())


def _width(job: Job) -> int:
    return torch.empty((), dtype=job.precision.dtype).element_size()


def _stage(job: Job) -> int:
    return int(job.shard.removeprefix("zero "))
