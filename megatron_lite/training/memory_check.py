"""What the planner says about a job's memory: whether it fits when it starts, and how far off the plan was at the end.

An observer: what goes wrong in it is reported, and never ends a training. On a CPU it says nothing at the start, for its memory is shared
and can be swapped; at the end it compares with the growth of the process's resident set, where that is large enough to be the model's and
not the libraries'.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from megatron_lite.atomic import whole_file
from megatron_lite.background import Lost
from megatron_lite.hardware import GPUS
from megatron_lite.planner.job import Job
from megatron_lite.planner.memory import OUTSIDE, Memory, memory
from megatron_lite.planner.plan import overrides_of
from megatron_lite.planner.search import NOT_SEARCHED, search
from megatron_lite.runtime import Runtime
from megatron_lite.tracking.memory import MEMORY_FILE
from megatron_lite.training.config import RunConfig
from megatron_lite.training.metrics import memory_gib
from megatron_lite.training.planning import check_layout, has_scan_kernels, job_of, teacher_of

# Growth of a process on a CPU from which on it is compared with the plan: less may be libraries.
_LEAST_GIB = 0.5
_LAYOUTS = 3
_SECONDS = 10.0  # of looking for them, while all ranks wait


@dataclass(frozen=True)
class DeviceMemory:
    """A GPU by torch's name, and its bytes."""

    name: str
    size: int

    @classmethod
    def of(cls, device: torch.device) -> DeviceMemory | None:
        """That of this process; None on a CPU."""
        if device.type != "cuda":
            return None
        properties = torch.cuda.get_device_properties(device)
        return cls(properties.name, properties.total_memory)


class MemoryCheck:
    """The plan of one job's memory, beside what it takes. `lost` collects failures. gpu: which it must fit; None: this process's."""

    def __init__(self, run: RunConfig, runtime: Runtime, lost: Lost, gpu: DeviceMemory | None = None) -> None:
        self.run, self.runtime, self.lost = run, runtime, lost
        self.gpu = gpu or DeviceMemory.of(runtime.device)
        self.before = 0.0 if runtime.device.type == "cuda" else memory_gib(runtime.device)

    def warn(self) -> None:
        """Warn on the main process of a GPU whose memory the plan exceeds."""
        if self.gpu is None or not self.runtime.is_main:
            return
        try:
            text = too_large(self.run, self.runtime.world_size, self.gpu)
        except Exception as error:
            self.lost(f"plan of the memory: {type(error).__name__}: {error}")
            return
        if text:
            print(f"WARNING: {text}")

    def conclude(self) -> str:
        """How far the plan was off, in a line; empty where nothing can be said. Writes `memory.json` for the report."""
        measured = memory_gib(self.runtime.device) - self.before
        on_cpu = self.runtime.device.type != "cuda"
        if on_cpu and measured < _LEAST_GIB:
            return ""
        try:
            planned = _planned(self.run, self.runtime.world_size, "cpu" if on_cpu else "cuda")
            directory = Path(self.run.run.dir)
            content = {"planned": planned.parts, "moment": planned.moment, "measured": measured * 2**30}
            with whole_file(directory / MEMORY_FILE) as temporary:
                temporary.write_text(json.dumps(content) + "\n")
        except Exception as error:
            self.lost(f"plan of the memory: {type(error).__name__}: {error}")
            return ""
        gib = planned.total / 2**30
        what = "more than before the model was built" if on_cpu else "in torch's allocator"
        return f"memory of a rank: planned {gib:.2f} GiB, measured {measured:.2f} GiB {what} (plan {gib / measured - 1:+.0%})."


def too_large(run: RunConfig, world_size: int, gpu: DeviceMemory) -> str:
    """Why a rank of `run` does not fit into the GPU, and layouts that would; empty if it fits."""
    planned = _planned(run, world_size, "cuda")
    if planned.total + OUTSIDE <= gpu.size:
        return ""
    parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in sorted(planned.parts.items(), key=lambda p: -p[1]))
    return (
        f"this layout is planned to take {planned.total / 1e9:.1f} GB of a rank ({parts}) and about {OUTSIDE / 1e9:.0f} outside of torch's "
        f"allocator, but {gpu.name} has {gpu.size / 1e9:.1f} GB. {_that_would(run, world_size, gpu)}"
    )


def _planned(run: RunConfig, world_size: int, device: str) -> Memory:
    return memory(_job(run, world_size, device), device=device)


def _job(run: RunConfig, world_size: int, device: str) -> Job:
    kernels = device == "cuda" and has_scan_kernels(run.model)
    return job_of(run, world_size, teacher=teacher_of(run), scan_kernels=kernels)


def _that_would(run: RunConfig, world_size: int, gpu: DeviceMemory) -> str:
    known = next((row for row in GPUS if re.search(row.pattern, gpu.name)), None)
    if known is None:
        return "Shard more (engine.shard=full, parallel.tp), recompute more, or lower train.micro_batch_size."
    try:
        known = replace(known, memory=gpu.size)  # a data sheet's is a round number
        job, check = _job(run, world_size, "cuda"), partial(check_layout, run)
        found = search(job, known, check=check, show=_LAYOUTS, patience=_SECONDS)
    except ValueError as error:  # none does
        return f"{error}."
    left = sum(one.loses == NOT_SEARCHED for one in found.others)
    more = f" ({left} ways to cut the layers were not searched: `mlite plan search=true` does)" if left else ""
    return "These would fit: " + "; or ".join(overrides_of(one.job) for one in found.best) + more
