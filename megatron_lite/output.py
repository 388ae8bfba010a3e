"""Standard output and standard error of a job that must continue when they are no longer read.

A pipe may be closed (`| head`) or full (a pager that waits), or a disk may be full (`> log`), and many parts print: the
console tracker, torch's warnings, libraries. Notable features:
- A thread writes the text straight to the file descriptor, so that no print blocks and no lock is held when Python exits.
- A stream that cannot be written is redirected to /dev/null, also for C++ code and for Python's own flush at exit.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from megatron_lite.background import Background

PATIENCE_SECONDS = 5.0  # for the last lines of a job


class Output(io.TextIOBase):
    """A text stream in front of `stream`; `write` returns at once."""

    def __init__(self, stream: Any, *, name: str, on_loss: Callable[[str], None]) -> None:
        self._stream = stream
        self._background = Background(name, on_loss=on_loss)
        self._descriptor: int | None = None
        with suppress(OSError, ValueError):  # a test's stream has none
            self._descriptor = stream.fileno()
            stream.flush()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        self._background.call(partial(self._write, text))
        return len(text)

    def finish(self) -> None:
        """Wait a moment until everything is written; what waits longer is lost, and so is what comes after it."""
        written = self._background.finish(time.monotonic() + PATIENCE_SECONDS)
        if not written:
            self._give_up()

    def _write(self, text: str) -> None:
        descriptor = self._descriptor
        if descriptor is None:
            self._stream.write(text)
            self._stream.flush()
            return
        data = text.encode(self.encoding, errors="backslashreplace")
        try:
            while data:
                with suppress(BlockingIOError):  # a descriptor that another program made non-blocking
                    data = data[os.write(descriptor, data) :]
                    continue
                time.sleep(0.05)
        except OSError:
            self._give_up()
            raise

    def _give_up(self) -> None:
        """Once: later the number may be that of another file."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            _redirect_to_devnull(descriptor)


@contextmanager
def output_in_background(on_loss: Callable[[str], None]) -> Iterator[None]:
    """Inside, standard output and error are `Output`s."""
    for descriptor in (1, 2):  # closed when the job began (`>&-`): the next opened file must not get its number
        try:
            os.fstat(descriptor)
        except OSError:
            _redirect_to_devnull(descriptor)
    before = sys.stdout, sys.stderr
    names = ("standard output", "standard error")
    after = [
        None if stream is None else Output(stream, name=name, on_loss=on_loss) for stream, name in zip(before, names)
    ]
    sys.stdout, sys.stderr = after
    try:
        yield
    finally:
        for stream in after:
            if stream is not None:
                stream.finish()
        sys.stdout, sys.stderr = before


def _redirect_to_devnull(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
