"""Which layout is fastest on so many GPUs, and why each other one loses.

First come the variants of each cut that hold least: where they do not fit, none of the cut's variants does, and it is not timed. Every
other layout is timed: with the work of one sample, traced once for each way to cut and to recompute a layer, and scaled to the
micro-batch. Then they are tried from the fastest on, whether training's own check takes them and whether they fit, until enough are
found. Those are planned again with the work of their own micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

from megatron_lite.hardware import Gpu
from megatron_lite.models.flops import parameter_count
from megatron_lite.parallel.mesh import RECOMPUTE_MODES
from megatron_lite.planner.job import Job
from megatron_lite.planner.memory import OUTSIDE, Traced, memory, memory_at_least
from megatron_lite.planner.operators import Exchange, Passes, Step
from megatron_lite.planner.plan import layout_of, overrides_of
from megatron_lite.planner.time import DEFAULT, Assumptions, Clock, StepTime
from megatron_lite.planner.work import Unit, units_of

_LARGEST_MICRO_BATCH = 16

NOT_SEARCHED = "not searched: the time was over"

Check = Callable[[Job], None]
"""Raises ValueError for a layout that training refuses."""


@dataclass(frozen=True)
class Candidate:
    """A layout with its time and memory (bytes of a rank with what is outside of the allocator; None: not counted), and why it loses: the
    first one does not."""

    job: Job
    step: StepTime | None = None
    memory: int | None = None
    loses: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        timed = {} if self.step is None else {"step_seconds": self.step.seconds, "mfu": self.step.mfu}
        return {**layout_of(self.job), **timed, "memory": self.memory, "loses": self.loses}


@dataclass(frozen=True)
class Found:
    """best: layouts that fit, fastest first. others: all that were considered beside them."""

    best: list[Candidate]
    others: list[Candidate]


def search(
    job: Job,
    gpu: Gpu,
    *,
    check: Check,
    show: int = 8,
    assumptions: Assumptions = DEFAULT,
    patience: float = float("inf"),
) -> Found:
    """The `show` fastest layouts for the model, batch and precision of `job` on its GPUs.

    patience: seconds after which no further cut of the layers is looked at, except that there is at least one that may fit.
    Raises ValueError when none fits, naming what comes nearest.
    """
    clock, limits = Clock(gpu, assumptions), _Limits(job, gpu, check)
    timed, others = _timed(job, clock, limits, until=monotonic() + patience)
    best: list[Candidate] = []
    for number, candidate in enumerate(timed):
        if len(best) == show:
            others += [replace(slower, loses=why_slower(slower, best[0])) for slower in timed[number:]]
            break
        tried = limits.tried(candidate)
        (others if tried.loses else best).append(tried)
    if not best:
        raise ValueError(_nothing_fits(job, gpu, others))
    exact = [replace(one, step=clock.step(one.job, units_of(one.job))) for one in best]
    exact.sort(key=_seconds)
    return Found([exact[0], *(replace(one, loses=why_slower(one, exact[0])) for one in exact[1:])], others)


def layouts(job: Job, node: int) -> Iterator[Job]:
    """Every cut of a layer that is considered, with engine and micro-batch still to be chosen: tensor parallelism in powers of two inside
    a node, with sequence parallelism where the sequence divides, times context parallelism."""
    for tp in _powers(min(node, job.gpus)):
        for cp in _powers(job.gpus // tp):
            if job.gpus % (tp * cp) == 0:
                cut = tp > 1 and (job.seq_len // cp + job.model.meta_tokens) % tp == 0
                parallel = replace(
                    job.parallel, tp=tp, cp=cp, dp_shard=None, dp_replicate=1, sequence_parallel=cut, recompute="none"
                )
                yield replace(job, parallel=parallel, micro_batch=1)


def variants(job: Job, node: int) -> Iterator[Job]:
    """Every engine mode, number of replicas and micro-batch for one cut of the layers."""
    ranks = job.gpus // (job.parallel.tp * job.parallel.cp)
    in_node = min(ranks, max(1, node // (job.parallel.tp * job.parallel.cp)))
    replicas = [
        1,
        *sorted({count for count in (*_powers(ranks), ranks // in_node) if 1 < count < ranks and ranks % count == 0}),
    ]
    share = job.global_batch // ranks
    for engine in _engines(job):
        for count in replicas if engine.name == "fsdp" and not engine.replicates else [1]:
            for micro_batch in _powers(min(share, _LARGEST_MICRO_BATCH)):
                if share % micro_batch == 0:
                    parallel = replace(job.parallel, dp_replicate=count)
                    yield replace(job, engine=engine, parallel=parallel, micro_batch=micro_batch)


def _engines(job: Job) -> list[Any]:
    if job.engine.name == "deepspeed":
        return [replace(job.engine, zero_stage=stage) for stage in (1, 2, 3)]  # type: ignore[type-var]
    return [replace(job.engine, shard=mode) for mode in ("none", "optimizer", "full")]  # type: ignore[type-var]


def _timed(job: Job, clock: Clock, limits: _Limits, *, until: float) -> tuple[list[Candidate], list[Candidate]]:
    """(layouts with their times, fastest first; those of cuts that are refused, do not fit, or come after the time `until`)."""
    timed: list[Candidate] = []
    lost: list[Candidate] = []
    for cut in layouts(job, clock.gpu.node):
        if timed and monotonic() > until:
            lost.append(Candidate(cut, loses=NOT_SEARCHED))
            continue
        if reason := limits.refusal(cut):
            lost.append(Candidate(cut, loses=reason))
            continue
        modes = [replace(cut, parallel=replace(cut.parallel, recompute=mode)) for mode in RECOMPUTE_MODES]
        every = [list(variants(recomputing, clock.gpu.node)) for recomputing in modes]
        if all(limits.is_too_large(one) for one in _holding_least(every[-1])):
            lost += [limits.tried(Candidate(one)) for of_mode in every for one in of_mode]
            continue
        for recomputing, of_mode in zip(modes, every):
            work = _Work(recomputing)
            timed += [Candidate(one, clock.step(one, work.of(one.micro_batch))) for one in of_mode]
    return sorted(timed, key=_seconds), lost


class _Work:
    """The units of a job with one sample, and scaled to a micro-batch: right but for the weights, which a product reads once."""

    def __init__(self, job: Job) -> None:
        self._scaled = {1: units_of(job)}

    def of(self, micro_batch: int) -> list[Unit]:
        if micro_batch not in self._scaled:
            passes: dict[int, Passes] = {}  # layers that are alike share theirs
            for unit in self._scaled[1]:
                if id(unit.passes) not in passes:
                    passes[id(unit.passes)] = _times(unit.passes, micro_batch)
            self._scaled[micro_batch] = [replace(unit, passes=passes[id(unit.passes)]) for unit in self._scaled[1]]
        return self._scaled[micro_batch]


def _times(passes: Passes, count: int) -> Passes:
    def scaled(step: Step) -> Step:
        if isinstance(step, Exchange):
            return replace(step, size=step.size * count)
        return replace(step, flops=step.flops * count, bytes=step.bytes * count)

    return Passes([scaled(step) for step in passes.forward], [scaled(step) for step in passes.backward])


class _Limits:
    """What training refuses, and what does not fit. A layout that holds more than one that does not fit is not counted."""

    def __init__(self, job: Job, gpu: Gpu, check: Check) -> None:
        self.gpu, self.check = gpu, check
        self._parameters = parameter_count(job.model)
        self._too_large: list[Candidate] = []
        self._traced: dict[Any, Traced] = {}

    def refusal(self, job: Job) -> str:
        """Why training refuses it; empty if it does not."""
        try:
            self.check(job)
            _ = job.micro_batches
        except ValueError as error:
            return str(error)
        return ""

    def is_too_large(self, job: Job) -> bool:
        """Whether it does not fit, whether or not training would take it."""
        return bool(self._sized(Candidate(job)).loses)

    def tried(self, candidate: Candidate) -> Candidate:
        """With its memory, and why it loses if training refuses it or it does not fit."""
        if reason := self.refusal(candidate.job):
            return replace(candidate, loses=reason)
        for smaller in self._too_large:
            if candidate.job == smaller.job:
                return replace(candidate, memory=smaller.memory, loses=smaller.loses)
            if _holds_more(candidate.job, smaller.job):
                return replace(candidate, loses=f"does not fit: holds more than {overrides_of(smaller.job)}")
        return self._sized(candidate)

    def _sized(self, candidate: Candidate) -> Candidate:
        held, about = memory_at_least(candidate.job, self._parameters) + OUTSIDE, "at least "
        if held <= self.gpu.memory:
            held, about = memory(candidate.job, traced=self._passes(candidate.job)).total + OUTSIDE, ""
        if held <= self.gpu.memory:
            return replace(candidate, memory=held)
        reason = f"does not fit: {about}{held / 1e9:.1f} of {self.gpu.memory / 1e9:.0f} GB"
        self._too_large.append(replace(candidate, memory=held, loses=reason))
        return self._too_large[-1]

    def _passes(self, job: Job) -> Traced:
        """What its passes hold, which other engine modes and numbers of replicas share."""
        key = (
            job.parallel.tp,
            job.parallel.cp,
            job.parallel.recompute,
            job.micro_batch,
            job.keeps_weights,
            job.gathers_codes,
        )
        if key not in self._traced:
            self._traced[key] = Traced.of(job, "cuda")
        return self._traced[key]


def _holding_least(every: list[Job]) -> list[Job]:
    """Of the variants of one cut those that hold more than none of the others: where they do not fit, none does."""
    return [one for one in every if not any(_holds_more(one, other) for other in every if other is not one)]


def _holds_more(job: Job, other: Job) -> bool:
    """Whether it shards, recomputes or divides the batch at most as much, with layers that are cut the same way. One that accumulates
    gradients keeps all of them from one micro-batch to the next, which one with a larger micro-batch may not have to."""
    if (job.parallel.tp, job.parallel.cp) != (
        other.parallel.tp,
        other.parallel.cp,
    ) or other.accumulates > job.accumulates:
        return False
    return all(mine <= theirs for mine, theirs in zip(_saves(job), _saves(other)))


def _saves(job: Job) -> tuple[float, ...]:
    """Numbers that rise with what a layout saves."""
    modes = [_mode(engine) for engine in _engines(job)]
    copies = float("inf") if job.engine.replicates else job.parallel.dp_replicate
    return modes.index(_mode(job.engine)), RECOMPUTE_MODES.index(job.parallel.recompute), -job.micro_batch, -copies


def _mode(engine: Any) -> Any:
    return engine.zero_stage if engine.name == "deepspeed" else engine.shard


def why_slower(slower: Candidate, best: Candidate) -> str:
    """The parts of a step in which it loses time against the best."""
    assert slower.step is not None, "only layouts with times are compared"
    assert best.step is not None, "only layouts with times are compared"
    behind = slower.step.seconds - best.step.seconds
    parts = {name: seconds - best.step.parts.get(name, 0.0) for name, seconds in slower.step.parts.items()}
    worst = [(name, more) for name, more in sorted(parts.items(), key=lambda item: -item[1])[:2] if more > 0.1 * behind]
    where = ", ".join(f"{name} {1e3 * more:+.3g} ms" for name, more in worst)
    return f"{1e3 * behind:.3g} ms slower: {where}" if where else f"{1e3 * behind:.3g} ms slower"


def _nothing_fits(job: Job, gpu: Gpu, others: list[Candidate]) -> str:
    counted = [one for one in others if one.memory is not None]
    left = sum(one.loses == NOT_SEARCHED for one in others)
    unknown = f"; {left} ways to cut the layers were not searched" if left else ""
    if not counted:
        return f"no layout of gpus={job.gpus} works: {others[0].loses}"
    nearest = min(counted, key=lambda one: (one.memory or 0, one.job.micro_batch))
    return (
        f"no layout fits gpus={job.gpus} gpu={gpu.name}: the nearest, {overrides_of(nearest.job)}, {nearest.loses} a rank; give more gpus, "
        f"a gpu with more memory, or a shorter data.seq_len{unknown}"
    )


def _powers(most: int) -> list[int]:
    """1, 2, 4 .. up to `most`."""
    return [1 << exponent for exponent in range(most.bit_length())] if most else []


def _seconds(candidate: Candidate) -> float:
    assert candidate.step is not None, "a layout without a time"
    return candidate.step.seconds
