"""Where the time of a step goes: `profile.steps=3` leaves a trace and a table in `<run.dir>/profile/`.

Notable features:
- `Profiler.watch` stands around the iterator of the steps, so that the loop knows nothing of it: from one step to the next is
  that step with its logging, and the wait for its batch is marked `wait for data`.
- Only one process records. Numbers are not changed, speed is: the rows of profiled steps are slower than others.
- trace.json opens in https://ui.perfetto.dev or chrome://tracing; table.txt ranks the operators by the time spent in themselves.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

TRACE, TABLE = "trace.json", "table.txt"
_ROWS = 40

Step = TypeVar("Step")


@dataclass
class ProfileConfig:
    """steps: how many steps are recorded, 0 for none. skip: steps of this job before it, so that warm-up is not measured."""

    steps: int = 0
    skip: int = 2

    def validate(self) -> None:
        """Raise ValueError naming the key."""
        for key in ("steps", "skip"):
            if getattr(self, key) < 0:
                raise ValueError(f"profile.{key}={getattr(self, key)} must not be negative")


class Profiler:
    """Records `config.steps` steps of this job and writes them to `directory` when they are done, or the job is."""

    def __init__(self, config: ProfileConfig, directory: Path, *, main_process: bool = True) -> None:
        self.config, self.directory = config, directory
        self.enabled = main_process and config.steps > 0

    def watch(self, steps: Iterator[Step]) -> Generator[Step, None, None]:
        """The same steps; what is done with each of them, until the next is asked for, is recorded when its turn has come."""
        if not self.enabled:
            yield from steps
            return
        for _, early in zip(range(self.config.skip), steps):
            yield early
        recording = profile(activities=_activities())
        recording.start()
        done = 0
        try:
            while done < self.config.steps and (step := _next(steps)) is not None:
                with record_function("step"):
                    done += 1
                    yield step
        finally:
            recording.stop()
            if done:
                self._write(recording, done)
        yield from steps

    def _write(self, recording: profile, done: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        recording.export_chrome_trace(str(self.directory / TRACE))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        table = recording.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=_ROWS)
        text = f"{done} steps after the first {self.config.skip} of the job; `Self` is without what an operator calls\n\n{table}"
        (self.directory / TABLE).write_text(text, encoding="utf-8")


def _next(steps: Iterator[Step]) -> Step | None:
    with record_function("wait for data"):
        return next(steps, None)


def _activities() -> list[ProfilerActivity]:
    cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *cuda]
