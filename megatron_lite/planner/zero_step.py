"""What a step holds under DeepSpeed's ZeRO 1, 2 and 3, with the settings of `engine/deepspeed.py`.

The order of events is that of DeepSpeed (runtime/zero/stage_1_and_2.py, stage3.py):

- Stage 1 in bf16 has an fp32 buffer for all gradients, also between steps (runtime/bf16_optimizer.py).
- Stage 1 keeps all gradients in fp32 until backward is done, and then moves them through one bucket, which is there since the first of
  them. Stage 2 moves each into the bucket at once. A full bucket is summed over the ranks, each rank's part in a copy, and what is in
  this rank's partition is kept. In bf16 stage 2 puts the bucket's slices together in one copy, and sums another one in fp32.
- The update copies this rank's gradients into one flat tensor.
- Stage 3 keeps bucket and gradient partition between steps too. What it gathers for forward it keeps until backward, up to 10^9
  parameters. It sums a bucket in a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.planner.fsdp_step import FP32
from megatron_lite.planner.passes import NO_TEACHER, Frozen, backward, forward, in_backward, in_forward
from megatron_lite.planner.timeline import Timeline
from megatron_lite.planner.trace import Unit

# stage3_max_live_parameters of DeepSpeed
_MOST_LIVE = 1_000_000_000


@dataclass(frozen=True)
class Zero:
    """stage: 1, 2 or 3. ranks: over which it shards. width: bytes of a number in forward and backward. bucket: numbers in it.

    overlaps: gradients are reduced beside backward, with two buckets. accumulates: more than one micro-batch. offload: optimizer's part
    on the CPU.
    """

    stage: int
    ranks: int
    width: int
    bucket: int
    overlaps: bool
    accumulates: bool
    offload: bool = False

    @property
    def bucket_bytes(self) -> int:
        """Bytes of the buffers that gradients are collected in."""
        width = self.width if self.stage == 2 else FP32
        return self.bucket * width * (2 if self.overlaps and self.stage < 3 else 1)

    @property
    def keeps_gradients(self) -> bool:
        """Whether all gradients have a buffer that stays."""
        return self.stage == 1 and self.width < FP32

    def gathered(self, unit: Unit) -> int:
        """Bytes of a unit's weights as stage 3 computes with them; one rank has them already."""
        return self.width * unit.numbers if self.ranks > 1 else 0

    def partition(self, numbers: int) -> int:
        """Bytes of this rank's fp32 part of `numbers` gradients."""
        return 0 if self.offload else FP32 * -(-numbers // self.ranks)

    def reduction(self, numbers: int) -> int:
        """Bytes of the copies in which `numbers` of a bucket are summed over the ranks."""
        if self.stage == 3:
            return FP32 * numbers
        if self.width == FP32:
            return FP32 * min(numbers, self.bucket) if self.ranks > 1 else 0
        return (FP32 + (self.width if self.stage == 2 else 0)) * numbers


def zero_step(timeline: Timeline, units: list[Unit], zero: Zero, teacher: Frozen = NO_TEACHER) -> None:
    """A step of DeepSpeed."""
    if zero.stage == 3:
        _gathering_step(timeline, units, zero, teacher)
    else:
        _partitioning_step(timeline, units, zero, teacher)


def _partitioning_step(timeline: Timeline, units: list[Unit], zero: Zero, teacher: Frozen) -> None:
    numbers = sum(unit.numbers for unit in units)
    if zero.accumulates and not zero.keeps_gradients:
        timeline.hold("gradients", FP32 * numbers if zero.stage == 1 else zero.partition(numbers))
    for unit in in_forward(timeline, units, teacher):
        forward(timeline, unit)
    timeline.hold("communication", zero.bucket_bytes)
    collected = partition = 0
    for unit in in_backward(timeline, units):
        backward(timeline, unit)
        if zero.stage == 1:
            timeline.hold("gradients", 0 if zero.accumulates or zero.keeps_gradients else FP32 * unit.numbers)
            continue
        collected += unit.numbers
        if collected >= zero.bucket:
            partition = _keep_partition(timeline, zero, numbers, partition)
            timeline.spike("communication", zero.reduction(min(collected, zero.bucket)))
            collected = 0
    timeline.at = "the reduction of gradients"
    releases = zero.stage == 1 and not zero.keeps_gradients
    if releases:
        timeline.release("gradients", FP32 * min(numbers, zero.bucket))
    partition = _keep_partition(timeline, zero, numbers, partition)
    timeline.spike("communication", zero.reduction(min(numbers, zero.bucket)))
    if releases:
        timeline.release("gradients", FP32 * (numbers - min(numbers, zero.bucket)))
    timeline.at = "the update"
    timeline.spike("gradients", partition)  # in one flat tensor
    timeline.release("communication", zero.bucket_bytes)


def _keep_partition(timeline: Timeline, zero: Zero, numbers: int, already: int) -> int:
    """This rank's gradients, which have their memory since the first reduction."""
    partition = zero.partition(numbers)
    if not already and not (zero.accumulates and zero.stage == 2):
        timeline.hold("gradients", partition)
    return partition


def _gathering_step(timeline: Timeline, units: list[Unit], zero: Zero, teacher: Frozen) -> None:
    live: set[str] = set()
    numbers = collected = 0
    for unit in in_forward(timeline, units, teacher):
        timeline.hold("gathered", zero.gathered(unit))
        forward(timeline, unit)
        if numbers + unit.numbers <= _MOST_LIVE:
            live.add(unit.name)
            numbers += unit.numbers
        else:
            timeline.release("gathered", zero.gathered(unit))
    for unit in in_backward(timeline, units):
        timeline.hold("gathered", 0 if unit.name in live else zero.gathered(unit))
        backward(timeline, unit)
        timeline.spike("gradients", zero.width * unit.numbers)  # on their way into the bucket
        timeline.release("gathered", zero.gathered(unit))
        collected += unit.numbers
        if collected >= zero.bucket or unit is units[0]:
            timeline.spike("communication", zero.reduction(min(collected, zero.bucket)))
            collected = 0
    timeline.at = "the update"
