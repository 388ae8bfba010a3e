"""What an FP8 run does about spikes: it looks for the module at fault, and computes more exactly if they keep coming.

    fp8  ->  fp8_forward (FP8 forward, bf16 backward; delayed scaling has none)  ->  bf16

An event is a logged row in which the detector reports spikes (`train.on_spike`), or in which the run would give up because
`train.max_skipped_steps` updates in a row were left out; the latter is the only one with `train.on_spike=ignore`. At an event
- the samples of the newest such step are drawn again, since the order of the data is a function of their numbers, and run through the
  weights at hand; the row and the checkpoints name the first operand in the order of computation that is out of line
  (`first_out_of_line`). Nothing of that reaches weights, optimizer or amax histories.
- the run goes down one rung if it is the event number `precision.fallback_after` on its rung, and at once where it would give up.

Events are read at multiples of `train.log_every` and kept in every checkpoint, and the rung is a function of them. So it does not
depend on where a job was killed, and it survives a rollback, which the events cause. Another recipe begins on its first rung again.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_lite.optim.spikes import Spikes
from megatron_lite.precision.numerics import EVENTS, Numerics, Observation

OVERFLOW = 1e-3  # share of an operand beyond the largest number: a scale that lags behind saturates a few elements, not this many
UNDERFLOW = 0.5  # share of an operand that became 0
ABOVE_USUAL = 16.0  # times the amax of the same operand on the samples before: four of E4M3's eighteen binades
ABOVE_WEIGHTS = 64.0  # times the median amax of the weights

_NAMES = {
    "fp8": "FP8",
    "fp8_forward": "FP8 in the forward and bf16 in the backward pass",
    "bf16": "bf16",
}


class Operand(NamedTuple):
    """An operand's name: `input`, `weight` or `grad_output` of a linear layer."""

    module: str
    operand: str


class Reading(NamedTuple):
    """The largest values of an operand's `Observation`s on all ranks; infinite where one was not a number."""

    amax: float
    overflow: float
    underflow: float


Readings = dict[Operand, Reading]  # in the order of computation


@dataclass
class Ladder:
    """recipe: the name of the precision. after: `precision.fallback_after`, 0 for never. events: those of the whole run."""

    numerics: Numerics
    recipe: str
    after: int
    events: list[dict[str, Any]] = field(default_factory=list)

    def next_rung(self, *, at_once: bool) -> str:
        """The rung after one more event."""
        rungs, rung = self.numerics.rungs, self.numerics.rung
        lower = rungs[rungs.index(rung) + 1 :]
        here = sum(event["recipe"] == self.recipe and event["from"] == rung for event in self.events)
        return lower[0] if lower and self.after and (at_once or here + 1 >= self.after) else rung

    def add(self, event: dict[str, Any], *, at_once: bool) -> bool:
        """Complete `event` by rungs and recipe, keep it, and go to its rung; returns whether that is another one."""
        before = self.numerics.rung
        event |= {"recipe": self.recipe, "from": before, "rung": self.next_rung(at_once=at_once)}
        self.events.append(event)
        self.numerics.rung = event["rung"]
        return event["rung"] != before

    def state(self) -> dict[str, Any]:
        """For the manifest."""
        return {EVENTS: self.events} if self.events else {}

    def load_state(self, manifest: Mapping[str, Any]) -> None:
        """Add the events of a checkpoint to those at hand, which a rollback keeps, and go to the rung of the newest."""
        known = {(event["step"], event["end"]) for event in self.events}
        loaded = manifest.get(EVENTS, [])
        self.events += [event for event in loaded if (event["step"], event["end"]) not in known]
        rungs = [event["rung"] for event in self.events if event["recipe"] == self.recipe]
        if rungs and self.after:
            self.numerics.rung = rungs[-1]


class OnLadder(Protocol):
    """What the ladder needs of a `Trainer` (which imports this module, not the other way)."""

    runtime: Any
    position: Any
    schedule: Any
    loader: Any
    engine: Any
    ladder: Ladder


def climb_down(trainer: OnLadder, spikes: Spikes, *, at_once: bool) -> tuple[dict[str, Any], bool]:
    """Diagnose `spikes`, and go down a rung if it is time to. at_once: the run would give up.

    Returns what the row says of it (nothing where no operand is quantized, or no longer) and whether the run went down.
    """
    ladder = trainer.ladder
    if not ladder.numerics.rungs or ladder.numerics.rung == ladder.numerics.rungs[-1]:
        return {}, False
    start = _start_of(trainer, spikes.first_step)
    event: dict[str, Any] = {"step": spikes.first_step, "start": start, "end": spikes.end_sample}
    event |= diagnose(trainer, start, spikes.end_sample)
    fell = ladder.add(event, at_once=at_once)
    if trainer.runtime.is_main:
        where = f"{event['module']}, {event['operand']}: {event['why']}" if event["module"] else event["why"]
        then = f"; after step {trainer.position.step} the run computes in {_NAMES[event['rung']]}" if fell else ""
        warnings.warn(f"a spike at step {spikes.first_step}: {where}{then}", stacklevel=2)
    return {"fp8": {key: event[key] for key in ("module", "operand", "why", "rung")}}, fell


def diagnose(trainer: OnLadder, start: int, end: int) -> dict[str, str]:
    """The module, the operand, and why it is out of line, on the samples of the step that ended at sample `end`; empty names and a
    reason if none is. The same on all ranks. start: no sample before this one belongs to the spikes."""
    batch = trainer.schedule.projection.batch
    for event in reversed(trainer.ladder.events):  # samples of earlier spikes say nothing about what is usual
        start = event["start"] if event["start"] < start <= event["end"] else start
    before = batch.before(start)
    usual = observe(trainer, start - before, before) if start >= before else {}
    size = batch.before(end)
    found = first_out_of_line(observe(trainer, end - size, size), usual)
    if found is None:
        return {"module": "", "operand": "", "why": "no operand of a linear layer is out of line"}
    operand, why = found
    return {"module": operand.module, "operand": operand.operand, "why": why}


def _start_of(trainer: OnLadder, step: int) -> int:
    """The sample with which a step of this job began, or one a little later if batch sizes were changed since."""
    start = trainer.position.consumed_samples
    for _ in range(trainer.position.step - step + 1):
        start -= trainer.schedule.projection.batch.before(start)
    return max(start, 0)


def observe(trainer: OnLadder, start: int, size: int) -> Readings:
    """What is quantized when the samples [start, start + size) run through the weights at hand. Collective."""
    found: dict[Operand, list[Tensor]] = {}

    def keep(seen: Observation) -> None:
        values = torch.stack([seen.amax, seen.overflow, seen.underflow]).float()
        found.setdefault(Operand(seen.module, seen.operand), []).append(values)

    # what is compiled does not call back
    with trainer.ladder.numerics.collect(keep), torch.compiler.set_stance("force_eager"):
        trainer.engine.diagnose(trainer.loader.again(start, size))
    if not found:
        return {}
    largest = torch.stack([torch.stack(values).amax(dim=0) for values in found.values()])
    flat = trainer.runtime.maximum(largest.nan_to_num(nan=math.inf, posinf=math.inf).flatten().tolist())
    return {operand: Reading(*flat[3 * i : 3 * i + 3]) for i, operand in enumerate(found)}


def first_out_of_line(readings: Readings, usual: Readings) -> tuple[Operand, str] | None:
    """The first operand, in the order of computation, that no such operand should look like, and why. What comes after it has
    computed with its numbers. usual: the readings of other samples, maybe none."""
    weights = [reading.amax for operand, reading in readings.items() if operand.operand == "weight"]
    typical = statistics.median(weights) if weights else math.inf
    for operand, reading in readings.items():
        before = usual.get(operand, Reading(amax=math.inf, overflow=0.0, underflow=0.0))
        why = ""
        if not math.isfinite(reading.amax):
            why = "not finite"
        elif reading.overflow > OVERFLOW:
            why = f"{reading.overflow:.2%} of it overflows"
        elif reading.amax > ABOVE_USUAL * before.amax:
            why = f"amax {reading.amax:.3g}, on the samples before {before.amax:.3g}"
        elif operand.operand == "weight" and reading.amax > ABOVE_WEIGHTS * typical:
            why = f"amax {reading.amax:.3g}, of most weights {typical:.3g}"
        elif reading.underflow > max(UNDERFLOW, 2 * before.underflow):
            why = f"{reading.underflow:.1%} of it underflows"
        if why:
            return operand, why
    return None
