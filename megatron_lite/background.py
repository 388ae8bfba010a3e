"""Calls on a separate thread, for observers of a training run, which must neither delay nor end it.

Notable features:
- `Background.call` returns at once. The calls run one after the other, in the order of submission.
- No further calls are made after one that raises, hangs past the end or falls too far behind; `on_loss` is called once with
  the reason.
- The thread is a daemon, so a call that never returns does not keep the process alive.
"""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Callable

BACKLOG = 10_000  # calls that may wait: a night of log rows


class Lost:
    """The observers that a job has lost: each is reported once on standard error, and kept for status.json."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        try:
            warnings.warn(f"{reason}. Training continues.", stacklevel=2)
        except Warning:  # where warnings are errors: this one must not end what it is about
            return


class Background:
    """See above. name: of the observer, for messages. Any thread may call, one at a time."""

    def __init__(self, name: str, *, on_loss: Callable[[str], None], backlog: int = BACKLOG) -> None:
        self.name, self._on_loss = name, on_loss
        self._calls: queue.Queue[Callable[[], object] | None] = queue.Queue(backlog)
        self._lock = threading.Lock()
        self._lost = self._finished = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, action: Callable[[], object]) -> None:
        """Submit `action()`; its result is dropped."""
        if not self._lost and not self._finished:
            self._put(action)

    def end(self) -> None:
        """Let the thread end after the submitted calls. Later calls are dropped."""
        if not self._finished:
            self._finished = True
            self._put(None)

    def finish(self, deadline: float) -> bool:
        """Wait until all is done, or until `time.monotonic()` is `deadline`; returns whether it is. Later calls are dropped."""
        self.end()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._lose("it does not answer")
        return not self._lost

    def _put(self, action: Callable[[], object] | None) -> None:
        try:
            self._calls.put_nowait(action)
        except queue.Full:
            self._lose(f"it does not answer, and {self._calls.maxsize} calls wait")

    def _run(self) -> None:
        while (action := self._calls.get()) is not None and not self._lost:
            try:
                action()
            except BaseException as error:  # rich raises SystemExit when the pipe that it prints to is closed
                self._lose(f"{type(error).__name__}: {error}")
                return

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self._lost:
                return
            self._lost = True
        self._on_loss(f"{self.name} is left out: {reason}")


def within(seconds: float, action: Callable[[], object], *, name: str, on_loss: Callable[[str], None]) -> bool:
    """Call `action` and wait for it at most `seconds`; returns whether it succeeded. An error or a timeout goes to
    `on_loss`."""
    background = Background(name, on_loss=on_loss)
    background.call(action)
    return background.finish(time.monotonic() + seconds)
