"""What a step holds under FSDP2, and on one process: gathered weights, activations, gradients, and the buffers of collectives.

The order of events is that of torch's `fully_shard` (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py, _fsdp_collectives.py):

- A unit is gathered into one flat buffer and copied out of it. In forward the buffer lives until the next unit is gathered; in
  backward the buffer of the unit that comes next is filled while a unit computes.
- After a unit's backward its gradients are copied into one fp32 buffer, which lives until the next unit is reduced, and the reduced
  shard is the gradient that the optimizer gets.
- Before the last of several micro-batches all gradients are there already, not sharded, in fp32.

One process gathers nothing: its parameters are cast at the beginning of a step, and gradients are added up in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.planner.passes import NO_TEACHER, Frozen, backward, forward, in_backward, in_forward
from megatron_lite.planner.timeline import Timeline
from megatron_lite.planner.trace import Unit

FP32 = 4


@dataclass(frozen=True)
class Sharding:
    """shard: none | optimizer | full. ranks: over which each parameter is cut. width: bytes of a number in forward and backward.

    tied: the embedding is the head too. accumulates: more than one micro-batch. offload: shards, moments and gradients on the CPU.
    """

    shard: str
    ranks: int
    width: int
    tied: bool
    accumulates: bool
    offload: bool = False

    def kept(self, unit: Unit) -> int:
        """Bytes of this rank's shard of a frozen unit, which is kept as it computes."""
        in_fp32 = -(-unit.in_fp32 // self.ranks)
        return (unit.shard(self.ranks) - in_fp32) * self.width + in_fp32 * FP32

    def gathered(self, unit: Unit) -> int:
        """Bytes of all of a unit's weights as it computes with them."""
        return (unit.numbers - unit.in_fp32) * self.width + unit.in_fp32 * FP32

    def weights(self, unit: Unit) -> int:
        """Bytes of them as they are gathered: a byte a number in FP8."""
        return self.gathered(unit) - unit.gathered_codes * (self.width - 1)

    def buffer(self, unit: Unit) -> int:
        """Bytes of the flat buffer that it is gathered into; one rank needs none."""
        if self.ranks == 1:
            return 0
        return unit.shard(self.ranks) * self.ranks * self.width - unit.gathered_codes * (self.width - 1)

    def reshards(self, unit: Unit) -> bool:
        """Whether its weights are given up between forward and backward."""
        return self.shard == "full" and unit.name.startswith("layers.")


def undivided_step(timeline: Timeline, units: list[Unit], sharding: Sharding, teacher: Frozen = NO_TEACHER) -> None:
    """A step of one process."""
    casts = sharding.width < FP32
    numbers = sum(unit.numbers for unit in units)
    timeline.at = "the beginning of a step"
    timeline.hold("gathered", sum(map(sharding.gathered, units)) if casts else 0)
    if sharding.accumulates:
        timeline.hold("gradients", FP32 * numbers)
    for unit in in_forward(timeline, units, teacher):
        forward(timeline, unit)
    for unit in in_backward(timeline, units):
        backward(timeline, unit)
        if not sharding.accumulates:
            timeline.hold("gradients", FP32 * unit.numbers)
    timeline.release("gathered", timeline.held["gathered"])
    timeline.at = "the update"


def fsdp_step(timeline: Timeline, units: list[Unit], sharding: Sharding, teacher: Frozen = NO_TEACHER) -> None:
    """A step whose parameters FSDP2 shards, or only replicates (`shard=none`)."""
    if sharding.accumulates:
        timeline.hold("gradients", FP32 * sum(unit.numbers for unit in units))
        if sharding.shard == "optimizer":  # since the first micro-batch
            timeline.hold("gathered", sum(map(sharding.weights, units)))
    forward_pass(timeline, units, sharding, teacher)
    _backward(timeline, units, sharding)
    timeline.at = "the update"


def forward_pass(timeline: Timeline, units: list[Unit], sharding: Sharding, teacher: Frozen = NO_TEACHER) -> None:
    """The forward pass of a step's last micro-batch."""
    filled = 0
    for unit in in_forward(timeline, units, teacher):
        if not (sharding.accumulates and sharding.shard == "optimizer"):
            timeline.hold("communication", sharding.buffer(unit))
            timeline.release("communication", filled)
            filled = sharding.buffer(unit)
            timeline.hold("gathered", sharding.weights(unit))
        forward(timeline, unit)
        if sharding.reshards(unit):
            timeline.release("gathered", sharding.weights(unit))
    timeline.release("communication", filled)


def _backward(timeline: Timeline, units: list[Unit], sharding: Sharding) -> None:
    reducing = 0
    before = None
    for unit, after in zip(in_backward(timeline, units), [*units[-2::-1], None]):
        if sharding.reshards(unit):  # its buffer was filled while the unit before computed, or is now
            timeline.hold("gathered", sharding.weights(unit))
            if before and sharding.reshards(before):
                timeline.release("communication", sharding.buffer(unit))
        prefetched = sharding.buffer(after) if after and sharding.reshards(unit) and sharding.reshards(after) else 0
        timeline.hold("communication", prefetched)
        backward(timeline, unit)
        if not sharding.accumulates:
            timeline.hold("gradients", sharding.gathered(unit))
            if sharding.tied and unit.name == "head":  # the gradient of its weight waits for the embedding's
                timeline.hold("gradients", sharding.gathered(units[0]))
        timeline.release("gathered", sharding.weights(unit))
        timeline.release("communication", reducing)
        reducing, before = _reduce(timeline, unit, sharding), unit
    timeline.release("communication", reducing)


def _reduce(timeline: Timeline, unit: Unit, sharding: Sharding) -> int:
    """From a unit's gradients to this rank's shard of their sum. Returns the bytes of the buffer that stays for a while."""
    raw = FP32 * unit.numbers if sharding.accumulates else sharding.gathered(unit)
    if sharding.tied and unit.name == "embedding" and not sharding.accumulates:
        raw += sharding.gathered(unit)
    shard = FP32 * unit.shard(sharding.ranks)
    padded = shard * sharding.ranks
    timeline.hold("communication", padded)
    timeline.release("gradients", raw)
    if not sharding.offload:
        timeline.hold("gradients", shard)
    if sharding.ranks == 1:
        timeline.spike("communication", padded)  # torch divides into a copy
    return padded
