"""Where the time of a step goes: `profile.steps=3` leaves a trace and a table in `<run.dir>/profile/`.

Notable features:
- `Profiler.watch` wraps the iterator over the steps, so the loop knows nothing of it: a recorded step lasts until the
  next one is asked for, logging included, and the wait for its batch is marked `wait for data`.
- Only one process records. The numbers do not change, but profiled steps are slower than others.
- trace.json opens in https://ui.perfetto.dev or chrome://tracing; table.txt ranks the operators by their own time.
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
    """steps: number of steps to record, 0 for none. skip: steps of this job before them (warm-up is not recorded)."""

    steps: int = 0
    skip: int = 2

    def validate(self) -> None:
        """Raises ValueError naming the key if a value is invalid."""
        for key in ("steps", "skip"):
            if getattr(self, key) < 0:
                raise ValueError(f"profile.{key}={getattr(self, key)} must not be negative")


class Profiler:
    """Records `config.steps` steps of this job and writes them to `directory` when they, or the job, are done."""

    def __init__(self, config: ProfileConfig, directory: Path, *, main_process: bool = True) -> None:
        self.config, self.directory = config, directory
        self.enabled = main_process and config.steps > 0

    def watch(self, steps: Iterator[Step]) -> Generator[Step, None, None]:
        """Yields the same steps and records, for the chosen ones, all that happens until the next is asked for."""
        if not self.enabled:
            yield from steps
            return
        for _, early in zip(range(self.config.skip), steps):
            yield early
        self.enabled = False  # once: after a rollback the same job watches its steps again
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
        head = f"{done} steps after the first {self.config.skip} of the job; `Self` excludes what an operator calls"
        (self.directory / TABLE).write_text(f"{head}\n\n{table}", encoding="utf-8")


def _next(steps: Iterator[Step]) -> Step | None:
    with record_function("wait for data"):
        return next(steps, None)


def _activities() -> list[ProfilerActivity]:
    cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *cuda]
