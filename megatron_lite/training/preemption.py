"""Agreement between all ranks, every few steps, on whether a signal asks the job to save and stop.

A signal may reach a single rank only, and all ranks must stop after the same step, so they have to agree. Checking after
every step would need an all-reduce over all hosts in every step, which would keep every host from running ahead of its
device. Notable features:
- One all-reduce carries the signal and the time of the slowest step and validation batch since the last check. From these
  times every rank computes when the next check is, so no other message is needed.
- A signal is noticed within max(one step, `REACTION_SECONDS`). Checks are planned for half of that time, so the steps until
  the next one may take twice as long as the slowest one since the last check.
- There is a check after the first step. From one check to the next the number of steps at most doubles: on a GPU, where the
  host runs ahead, the first steps look faster than they are.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable

from megatron_lite.runtime import Runtime, Signals

REACTION_SECONDS = 5.0
KINDS = ("step", "validation batch")


class Preemption:
    """Checks all ranks for signals. Every rank must call `requested_after` at the same points.

    signal: the name of the signal that was agreed on, e.g. SIGTERM; None until then. The same on every rank.
    step_seconds: the slowest step between the last two checks, on the slowest rank; 0 before the first.
    """

    def __init__(self, runtime: Runtime, signals: Signals, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.signal: str | None = None
        self._runtime, self._signals, self._clock = runtime, signals, clock
        self._agreed = dict.fromkeys(KINDS, math.inf)  # seconds, as of the last question; an unknown time asks at once
        self._slowest = dict.fromkeys(KINDS, 0.0)  # seconds, on this rank since the last question
        self._expected = 0.0  # seconds since the last question, by the agreed times
        self._done, self._most = 0, 1  # steps and batches since the last question, and how many there may be
        self._began = clock()

    @property
    def step_seconds(self) -> float:
        return self._agreed["step"] if math.isfinite(self._agreed["step"]) else 0.0

    def requested_after(self, kind: str) -> bool:
        """Whether the job has to stop after this step or validation batch. Checks with the other ranks when a check is
        due."""
        now = self._clock()
        self._slowest[kind] = max(self._slowest[kind], now - self._began)
        self._began = now
        self._done += 1
        self._expected += self._agreed[kind]
        late = self._expected + self._agreed[kind] > REACTION_SECONDS / 2  # after one more of them it would be
        if self.signal is None and (late or self._done >= self._most or self._runtime.world_size == 1):
            self._ask()
        return self.signal is not None

    def resume(self) -> None:
        """Call it after a save: the time of the save is not counted as a step, and because a signal may have arrived during
        it, the next step is followed by a check."""
        self._began = self._clock()
        self._expected = math.inf

    def _ask(self) -> None:
        number, *slowest = self._runtime.maximum([float(self._signals.number or 0), *self._slowest.values()])
        if number:
            self.signal = signal.Signals(int(number)).name
        self._agreed |= {kind: seconds for kind, seconds in zip(KINDS, slowest) if seconds}
        self._slowest = dict.fromkeys(KINDS, 0.0)
        if self._done >= self._most:
            self._most *= 2
        self._done, self._expected = 0, 0.0
