"""Whether a signal asks the job to save and stop: a question to all ranks, asked every few steps.

A signal may reach one rank only, and all ranks must stop after the same step, so they have to agree. Asking after every step would
be an all-reduce over all hosts in every step, behind which no host could run ahead. Notable features:
- One all-reduce carries the signal and the time of the slowest step and validation batch since the last question. From these times
  every rank computes the same next question, so that no other message is needed.
- A signal is noticed within max(one step, `REACTION_SECONDS`). Questions are planned for half of that time: the steps until the next
  one may take twice as long as the slowest one since the last.
- The first step is followed by a question. From one question to the next the number of steps at most doubles: on a GPU, where the
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
    """Asks the ranks for signals; `requested_after` is called at the same places on every rank.

    signal: the name of the signal that was agreed on, e.g. SIGTERM; None until then. The same on every rank.
    step_seconds: the slowest step between the last two questions, on the slowest rank; 0 before the first.
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
        """Whether the job is to stop, now that a step or a validation batch is done. Asks the other ranks when it is time to."""
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
        """After a save: its time belongs to no step, and a signal may have come in it, so the next step is followed by a question."""
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
