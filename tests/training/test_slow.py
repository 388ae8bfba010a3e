"""Slow ranks: by the stacks of hosts on a CPU, and by what NCCL's flight recorder says about GPUs, which are imitated here."""

from __future__ import annotations

import json

import pytest

from megatron_lite.training.slow import Comparison, GpuOwnTime, OwnTime, share_in_collectives, slow_ranks

STEPS, TRANSFER = 20, 0.05  # seconds that a collective takes when all ranks come at once


def test_slow_ranks():
    assert slow_ranks({0: 1.0, 1: 1.1, 2: 4.0, 3: 2.0}, 1.5) == [2, 3]
    assert slow_ranks({0: 1.0, 1: 1.6}, 1.5) == [1]
    assert slow_ranks({0: 1.0}, 1.5) == []
    assert slow_ranks({0: 0.0, 1: 0.0005}, 1.5) == []  # differences below a millisecond do not count


def records(compute: list[float], *, beside: float = 0.0) -> tuple[list[bytes], float]:
    """What each rank's recorder holds of steps that compute so many seconds and then meet, and how long a step takes.

    beside: seconds of a second collective that runs while every rank computes.
    """
    step = max(compute) + TRANSFER
    entries: list[list[dict]] = [[] for _ in compute]
    for index in range(STEPS):
        for rank, seconds in enumerate(compute):
            durations = [step - seconds] + [beside] * bool(beside)
            entries[rank] += [{"time_created_ns": int(index * step * 1e9), "duration_ms": d * 1e3} for d in durations]
    return [
        json.dumps({"entries": [{"time_created_ns": 0, "duration_ms": None}, *rows]}).encode() for rows in entries
    ], step


def own_times(compute: list[float], **how: float) -> dict[int, float]:
    notes = {}
    made, step = records(compute, **how)
    for rank, record in enumerate(made):
        own = GpuOwnTime(lambda record=record: record, every=2 * step)
        for index in range(STEPS):
            own.add(step, frame=None, steps=index + 1)
        notes[rank] = own.note()
    return Comparison().own_times(notes)


@pytest.mark.parametrize(
    ("compute", "beside", "slow"),
    [
        ([1.0, 1.0, 1.0, 1.0], 0.0, []),
        ([1.0, 1.1, 0.9, 1.0], 0.0, []),
        ([1.0, 1.0, 2.0, 1.0], 0.0, [2]),
        ([1.0, 1.0, 2.0, 1.0], 0.9, [2]),
        ([1.0, 1.01, 1.0, 1.0], 1.04, []),  # busy with collectives for longer than a step takes
        ([1.0, 1.0, 1.0, 1.7, 2.0], 0.0, [4, 3]),
    ],
)
def test_a_slow_gpu_waits_least(compute, beside, slow):
    times = own_times(compute, beside=beside)
    assert slow_ranks(times, 1.5) == slow
    assert max(times.values()) == pytest.approx(max(compute) + TRANSFER, rel=0.1)  # it has the step for itself


def test_ranks_are_compared_from_one_look_to_the_next():
    comparison = Comparison()
    first, second = ({0: {"own": own, "in_collectives": 0.0, "steps": steps}} for own, steps in ((8.0, 4), (9.0, 6)))
    assert comparison.own_times(first) == {0: 2.0}
    assert comparison.own_times(first) == {}  # no new step
    assert comparison.own_times(second) == {0: 0.5}
    assert comparison.own_times({0: OwnTime().note()}) == {}  # a rank that has left


def test_a_recorder_without_times_says_nothing():
    assert share_in_collectives(b"{}") is None
    assert share_in_collectives(json.dumps({"entries": [{"time_created_ns": 5}] * 3}).encode()) is None
    untimed = b'{"entries": [{"duration_ms": 1}]}'
    for record in (None, b"not JSON", untimed, b'{"entries": 3}', b"[]"):
        own = GpuOwnTime(lambda record=record: record, every=1.0)
        own.add(2.0, frame=None, steps=3)
        assert Comparison().own_times({0: own.note()}) == {}
