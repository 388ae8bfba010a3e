"""How long a step takes: every kernel and collective at a stated part of the data sheet's speed, and what overlaps with what.

- A kernel takes as long as its FLOPs or its bytes need, whichever is more, and never less than a launch.
- Collectives within layers (tensor and context parallelism) wait for the layer and the layer for them.
- The gather of a unit's weights begins with the computation of the unit before it; the reduction of its gradients begins when its
  backward is done. Both share one network, in that order. What is not done when it is needed is waited for.

One constant is fitted: the part of its peak at which matrix products run, on the first row of Nemotron-4's table 2 (arXiv 2402.16819).
So it holds whatever that run had and this model leaves out, too. The others are published, or our choice, as said beside them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_lite.hardware import Gpu
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.flops import flops_per_token
from megatron_lite.planner.job import Job
from megatron_lite.planner.operators import ROUNDS, Exchange, Kernel, Step
from megatron_lite.planner.traffic import (
    GRADIENT_BYTES,
    TIMETABLES,
    Collective,
    exchange,
    group_of,
    sharding_of,
    stays_gathered,
)
from megatron_lite.planner.work import Unit, fp8_bytes

# AdamW reads weight, gradient and two moments and writes three of them (28 bytes), clipping reads and writes the gradient (8), the
# norm reads it (4): bytes for each number of a rank's shard.
_UPDATE_BYTES = 40


@dataclass(frozen=True)
class Assumptions:
    """Parts of the data sheet's speeds, and seconds; bytes/s of the CPU. `why` says what each is and where it comes from."""

    matmul: float = 0.616
    attention: float = 0.34
    scan: float = 0.3
    memory: float = 0.8
    link: float = 0.8
    network: float = 0.9
    launch: float = 3e-6
    host_link: float = 50e9
    host_memory: float = 30e9

    why: ClassVar[dict[str, str]] = {
        "matmul": "of the peak of their dtype: fitted on the first row of Nemotron-4's table 2 (arXiv 2402.16819)",
        "attention": "of the peak: FlashAttention-2 on an H100, forward and backward, 335 of 989 TFLOP/s (arXiv 2307.08691)",
        "scan": "of the peak of their dtype: our choice, for the kernels of state-space scans",
        "memory": "of the memory's bandwidth: our choice, for kernels that read and write once",
        "link": "of the bandwidth between the GPUs of a node: our choice",
        "network": "of the network cards' bandwidth: our choice",
        "launch": "seconds that a kernel takes at least: our choice",
        "host_link": "bytes/s between a GPU and its CPU in one direction: our choice, 0.8 of PCIe 5.0 x16",
        "host_memory": "bytes/s that the CPU reads and writes to update one GPU's part: our choice",
    }


DEFAULT = Assumptions()


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, and of its parts, which sum to it. mfu: as training logs it, without recomputation."""

    seconds: float
    parts: dict[str, float]
    mfu: float


@dataclass(frozen=True)
class _Timed:
    """Seconds of a unit, by part of a micro-batch's passes; of gathering its weights and of reducing its gradients, and of the copies
    that each of these needs on the stream that computes."""

    forward: Mapping[str, float]
    backward: Mapping[str, float]
    gather: float
    reduce: float
    copy_out: float
    copy_in: float
    stays: bool


_COPIES = "copies around gathers and reductions"


def _form(unit: Unit) -> tuple[Any, ...]:
    """What the time of a unit depends on. Units that are alike share one object of passes."""
    return id(unit.passes), unit.numbers, unit.gathered, unit.codes, unit.frozen, stays_gathered(unit)


def _sharded_numbers(job: Job, units: Sequence[Unit]) -> float:
    """Parameters that a rank updates."""
    degrees = job.degrees
    return sum(unit.numbers for unit in units if not unit.frozen) / (degrees.dp_shard * degrees.cp)


def _passes(job: Job, timed: Sequence[_Timed]) -> tuple[float, float]:
    """Seconds of forward and backward of all micro-batches, and how many of them are copies."""
    timetable, count, total, copies = TIMETABLES[job.shard], job.micro_batches, 0.0, 0.0
    for number in sorted({0, min(1, count - 1), count - 1}):
        times = count - 2 if 0 < number < count - 1 else 1  # those in the middle are alike
        reduces = timetable.reduces_each or number == count - 1
        there = [_pass(one.forward, one, gather=timetable.gathers_in_forward(number)) for one in timed]
        back = [
            _pass(one.backward, one, gather=timetable.backward and not one.stays, reduce=reduces) for one in timed[::-1]
        ]
        total += times * (overlapped(there) + overlapped(back))
        copies += times * sum(one.copies for one in (*there, *back))
    return total, copies


@dataclass(frozen=True)
class UnitPass:
    """Seconds of one pass of a unit: on the stream that computes (copies are part of it), gathering before it, reducing after it."""

    computes: float
    gather: float = 0.0
    reduce: float = 0.0
    copies: float = 0.0


def _pass(parts: Mapping[str, float], unit: _Timed, *, gather: bool, reduce: bool = False) -> UnitPass:
    copies = (unit.copy_out if gather and unit.gather else 0.0) + (unit.copy_in if reduce and unit.reduce else 0.0)
    return UnitPass(
        sum(parts.values()) + copies, unit.gather if gather else 0.0, unit.reduce if reduce else 0.0, copies
    )


def overlapped(units: Sequence[UnitPass]) -> float:
    """Seconds of a pass over units in their order, with one stream that computes and one that communicates.

    A unit computes when the unit before it is done and its own weights are there. Its gather is issued when the unit before it begins,
    its reduction when it is done itself.
    """
    network = arrived = units[0].gather
    done = 0.0
    for unit, after in zip(units, [*units[1:], UnitPass(0.0)]):
        begins = max(done, arrived)
        arrived = 0.0
        if after.gather:
            network = arrived = max(network, begins) + after.gather
        done = begins + unit.computes
        if unit.reduce:
            network = max(network, done) + unit.reduce
    return max(done, network)


class Clock:
    """Seconds of kernels, collectives and steps on one type of GPU. It remembers lists of steps: one for many layouts."""

    def __init__(self, gpu: Gpu, assumptions: Assumptions = DEFAULT) -> None:
        self.gpu, self.assume = gpu, assumptions
        self._passes: dict[tuple[int, int, int], tuple[list[Step], dict[str, float]]] = {}
        self._flops: dict[tuple[int, int], tuple[ModelConfig, float]] = {}

    def step(self, job: Job, units: Sequence[Unit]) -> StepTime:
        """The time of one step. Raises ValueError when the batch does not divide, or the GPU lacks the precision."""
        alike: dict[Any, _Timed] = {}  # most layers are
        for unit in units:
            if _form(unit) not in alike:
                alike[_form(unit)] = self._unit(job, unit)
        timed = [alike[_form(unit)] for unit in units if not unit.frozen]
        teacher = [alike[_form(unit)] for unit in units if unit.frozen]
        parts: dict[str, float] = defaultdict(float)
        for one in timed:
            for passed in (one.forward, one.backward):
                for name, seconds in passed.items():
                    parts[name] += job.micro_batches * seconds
        passes, parts[_COPIES] = _passes(job, timed)
        parts["waiting for weights and gradients"] = passes - sum(parts.values())
        if teacher:
            forward = overlapped([_pass(one.forward, one, gather=True) for one in teacher])
            parts["forward of the teacher"] = job.micro_batches * forward
        if kept_fp8 := sum(unit.kept_fp8 for unit in units):
            parts["casting weights to FP8"] = self.moved(fp8_bytes(job) * kept_fp8)
        parts["update"] = self._update(job, _sharded_numbers(job, units))
        world = Collective(4.0, group_of(job.degrees, "world", self.gpu.node), twice=True)
        parts["agreeing on the gradient norm"] = self.collective(world)
        if TIMETABLES[job.shard].after_update:
            parts["gathering weights after the update"] = sum(one.gather for one in timed)
        seconds = sum(parts.values())
        return StepTime(seconds, {n: value for n, value in parts.items() if value > 1e-9}, self.mfu(job, seconds))

    def _update(self, job: Job, numbers: float) -> float:
        """Of a rank's shard. On the CPU DeepSpeed waits for gradients to come, in fp32, and for weights to go back."""
        if not job.offloads:
            return self.moved(_UPDATE_BYTES * numbers)
        travels = 0.0
        if job.engine.name == "deepspeed":
            times = job.micro_batches if TIMETABLES[job.shard].reduces_each else 1
            travels = GRADIENT_BYTES * times + job.precision.dtype.itemsize
        return numbers * (_UPDATE_BYTES / self.assume.host_memory + travels / self.assume.host_link)

    def mfu(self, job: Job, seconds: float) -> float:
        """Of a step that takes so long, as training logs it. Raises ValueError for a GPU without the precision."""
        peak = self.gpu.flops(job.precision.peak)
        return self.flops_per_token(job) * job.tokens / (seconds * job.gpus * peak)

    def flops_per_token(self, job: Job) -> float:
        """As training counts them, with a third of a teacher's for its forward pass."""
        teacher = 0.0 if job.teacher is None else self._training_flops(job.teacher.model, job.seq_len) / 3
        return self._training_flops(job.model, job.seq_len) + teacher

    def _training_flops(self, model: ModelConfig, seq_len: int) -> float:
        key = id(model), seq_len
        if key not in self._flops:
            self._flops[key] = model, flops_per_token(model, seq_len)
        return self._flops[key][1]

    def _unit(self, job: Job, unit: Unit) -> _Timed:
        sharding = sharding_of(job, unit, self.gpu.node)
        travels = 0.0
        if (
            job.offloads and job.engine.name == "fsdp" and not unit.frozen
        ):  # an fp32 shard comes before a gather, its gradient goes
            travels = GRADIENT_BYTES * _sharded_numbers(job, [unit]) / self.assume.host_link
        return _Timed(
            forward=self._parts(job, unit.passes.forward),
            backward=self._parts(job, unit.passes.backward),
            gather=travels + sum(map(self.collective, sharding.gather)),
            reduce=travels + sum(map(self.collective, sharding.reduce)),
            copy_out=self.moved(2 * unit.sent),
            copy_in=self.moved(unit.gathered + GRADIENT_BYTES * unit.numbers),
            stays=stays_gathered(unit),
        )

    def _parts(self, job: Job, steps: list[Step]) -> dict[str, float]:
        key = id(steps), job.degrees.tp, job.degrees.cp
        if key not in self._passes:
            parts: dict[str, float] = defaultdict(float)
            seconds = 0.0
            for step in steps:
                if isinstance(step, Exchange):
                    beside = seconds if step.operation == ROUNDS else 0.0
                    seconds = self.collective(exchange(step, job.degrees, self.gpu.node))
                    parts[f"{step.axis} collectives"] += max(0.0, seconds - beside)
                else:
                    seconds = max(self._multiplied(step), self.moved(step.bytes))
                    parts[SCANS if step.of_scan else _NAMES[step.kind]] += seconds
            self._passes[key] = steps, parts
        return self._passes[key][1]

    def moved(self, size: float) -> float:
        """Reading and writing so many bytes."""
        return max(size / (self.gpu.bandwidth * self.assume.memory), self.assume.launch)

    def collective(self, collective: Collective) -> float:
        """One collective, alone on its links."""
        return collective.seconds(self.gpu, link=self.assume.link, network=self.assume.network)

    def _multiplied(self, kernel: Kernel) -> float:
        if not kernel.flops:
            return 0.0
        return kernel.flops / (self.gpu.flops(kernel.dtype) * getattr(self.assume, kernel.kind))


SCANS = "state-space scans"
_NAMES = {"matmul": "matrix products", "attention": "attention", "memory": "everything else"}
