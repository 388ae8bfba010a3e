"""Which ranks are slower than the others, by their own time per step: the time that they do not wait for others.

    on a CPU    sampled: at every tick the stack of the loop says whether it is in a collective
    on a GPU    from NCCL's flight recorder. A host's stack says little there (see `hang`), and the hosts of a slow and of a fast
                GPU take the same time for a step. But a slow GPU arrives last at every collective, so its collectives are
                the shortest: what another rank's take beyond the shortest ones is the time that it waits

A GPU's collectives are only timed if TORCH_NCCL_ENABLE_TIMING is set, which `runtime.start` does.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch

from megatron_lite.training.hang import waits_for_others


class OwnTime:
    """This rank's own seconds, those in collectives, and the number of steps that they are of."""

    def __init__(self) -> None:
        self._own, self._in_collectives, self._steps = 0.0, 0.0, 0

    def note(self) -> dict[str, float]:
        """What a heartbeat says about it."""
        return {"own": self._own, "in_collectives": self._in_collectives, "steps": self._steps}

    def add(self, seconds: float, *, frame: FrameType | None, steps: int) -> None:
        """The loop, which has begun `steps` steps, was in a step for `seconds`, at the end at `frame`."""
        self._steps = steps
        if not waits_for_others(frame):
            self._own += seconds


class GpuOwnTime(OwnTime):
    """The same of a GPU, every `every` seconds. record: what the flight recorder holds, as JSON."""

    def __init__(self, record: Callable[[], bytes | None], *, every: float) -> None:
        super().__init__()
        self._record, self._every, self._waiting = record, every, 0.0

    def add(self, seconds: float, *, frame: FrameType | None, steps: int) -> None:
        """See `OwnTime`."""
        self._waiting += seconds
        if self._waiting < self._every:
            return
        share = None
        # A record of another form must not end the watchdog.
        with contextlib.suppress(AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            share = share_in_collectives(self._record() or b"{}")
        if share is not None:
            self._steps = steps
            self._own += (1 - share) * self._waiting
            self._in_collectives += share * self._waiting
        self._waiting = 0.0


def flight_record(device: torch.device) -> bytes | None:
    """What the flight recorder of this process holds, as JSON; None if there is none. NCCL keeps one of its own."""
    name = "nccl" if device.type == "cuda" else "fr"
    dump = getattr(torch._C._distributed_c10d, f"_dump_{name}_trace_json", None)
    return dump() if dump is not None else None


def share_in_collectives(record: bytes) -> float | None:
    """Seconds in collectives for each second, over all that a flight recorder's JSON holds; None if it has timed none.

    Above 1 where collectives of several groups run side by side.
    """
    entries = [entry for entry in json.loads(record).get("entries", []) if entry.get("duration_ms") is not None]
    created = [int(entry["time_created_ns"]) for entry in entries]
    span = (max(created) - min(created)) / 1e6 if created else 0.0
    return sum(float(entry["duration_ms"]) for entry in entries) / span if span > 0 else None


class Comparison:
    """The ranks' own times, from one look at their heartbeats to the next."""

    def __init__(self) -> None:
        self._before: dict[int, Mapping[str, Any]] = {}

    def own_times(self, notes: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
        """rank -> own seconds per step since the last call, of ranks that have done a step.

        The collectives of the rank that waits least are work like any other, for every rank.
        """
        own, in_collectives = {}, {}
        nothing = OwnTime().note()
        for rank, note in notes.items():
            before = self._before.get(rank, nothing)
            steps = note["steps"] - before["steps"]
            if steps > 0:
                own[rank] = (note["own"] - before["own"]) / steps
                in_collectives[rank] = (note["in_collectives"] - before["in_collectives"]) / steps
                self._before[rank] = note
        least = min(in_collectives.values(), default=0.0)
        return {rank: seconds + least for rank, seconds in own.items()}


def slow_ranks(times: Mapping[int, float], factor: float) -> list[int]:
    """Ranks whose own time is more than `factor` times the median, the slowest first."""
    if len(times) < 2:
        return []
    typical = statistics.median_low(times.values())  # of two ranks, the faster one
    return sorted((rank for rank, own in times.items() if own > factor * max(typical, 1e-3)), key=lambda r: -times[r])
