"""The forward and backward passes of a micro-batch over its units, as every engine runs them: activations, and what a teacher holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_lite.planner.timeline import Timeline
from megatron_lite.planner.trace import Unit


@dataclass(frozen=True)
class Frozen:
    """What the teacher of a distillation holds, in bytes.

    staying: its shards. computing: the most in its forward pass, beside them. waiting: until the loss is computed, its states and what is
    gathered of it. head: its output embedding, gathered for the loss.
    """

    staying: int = 0
    computing: int = 0
    waiting: int = 0
    head: int = 0


NO_TEACHER = Frozen()


def in_forward(timeline: Timeline, units: Sequence[Unit], teacher: Frozen = NO_TEACHER) -> Iterator[Unit]:
    """The units in the order of forward, each with its name as the moment, after the teacher's forward pass."""
    timeline.at = "forward of the teacher"
    timeline.spike("teacher", teacher.computing)
    timeline.hold("teacher", teacher.waiting)
    for unit in units:
        timeline.at = f"forward of {unit.name}"
        timeline.hold("FP8 weights", unit.codes)
        timeline.hold("teacher", teacher.head if unit is units[-1] else 0)
        yield unit
    timeline.release("teacher", teacher.waiting + teacher.head)


def in_backward(timeline: Timeline, units: Sequence[Unit]) -> Iterator[Unit]:
    """The units in the order of backward, each with its name as the moment."""
    for unit in reversed(units):
        timeline.at = f"backward of {unit.name}"
        yield unit
    timeline.release("FP8 weights", sum(unit.codes for unit in units))


def forward(timeline: Timeline, unit: Unit) -> None:
    """Activations of a unit's forward: its input, which is held, gives way to its output and to what is kept for backward."""
    part, passes = part_of(unit), unit.passes
    timeline.spike(part, passes.forward - passes.input)
    timeline.release("stream", passes.input)
    timeline.hold(part, passes.kept)
    timeline.hold("stream", passes.output)


def backward(timeline: Timeline, unit: Unit) -> None:
    """Activations of a unit's backward: the gradient of its output, which is held, gives way to that of its input."""
    part, passes = part_of(unit), unit.passes
    timeline.spike(part, passes.backward - passes.kept - passes.output)
    timeline.release(part, passes.kept)
    timeline.release("stream", passes.output)
    timeline.hold("stream", passes.input)


def part_of(unit: Unit) -> str:
    """The head's activations are logits and loss."""
    return "loss" if unit.name == "head" else "activations"
