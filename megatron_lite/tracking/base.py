"""What every tracker can do, and what it learns about the run.

A tracker takes rows (plain dictionaries, see `megatron_lite.training.metrics`) and shows or keeps them. Notable:
  - rows are either training rows (they have `loss`) or validation rows (`val_loss: {source: loss}`, no `loss`);
  - metrics.jsonl is the record of the run and is always written; the other trackers are observers, chosen by config;
  - only one process tracks: `build_tracker(..., main_process=False)` gives a tracker that does nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from megatron_lite.background import Background, Lost

Row = dict[str, Any]

PATIENCE_SECONDS = 60.0  # for the observers' last rows at the end of a job; W&B may have to upload them
WANDB_MODES = ("online", "offline", "disabled")


@dataclass
class WandbConfig:
    """Weights & Biases (`tracking=wandb`)."""

    enabled: bool = False
    project: str = "megatron_lite"
    entity: str | None = None  # user or team; None: the account's default
    name: str | None = None  # display name; None: the run directory's name
    mode: str | None = None  # online | offline | disabled; None: as W&B is set (WANDB_MODE), offline without a login
    tags: list[str] = field(default_factory=list)

    def validate(self) -> None:
        """Raises ValueError naming the key if a value is invalid."""
        if self.mode is not None and self.mode not in WANDB_MODES:
            raise ValueError(
                f"tracking.wandb.mode={self.mode} is unknown; choose one of {', '.join(WANDB_MODES)}, "
                "or null for what W&B itself is set to"
            )


@dataclass
class TrackingConfig:
    """The trackers beside metrics.jsonl, any number of them: `tracking=none`, `tracking=[wandb,tensorboard]`."""

    console: bool = True  # a progress bar, or plain lines when the output is not a terminal
    tensorboard: bool = False
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def validate(self) -> None:
        """Raises ValueError naming the key if a value is invalid or a chosen tracker's package is not installed."""
        self.wandb.validate()
        for key, chosen, package, command in (
            ("tracking.tensorboard", self.tensorboard, "tensorboard", "pip install 'megatron-lite[tensorboard]'"),
            ("tracking.wandb.enabled", self.wandb.enabled, "wandb", "pip install wandb"),
        ):
            if chosen and find_spec(package) is None:
                raise ValueError(f"{key}=true needs the package {package}: {command}, or set {key}=false")


@dataclass(kw_only=True)
class RunInfo:
    """The facts about a run that trackers show. `config` is plain data (dict, list, str, numbers)."""

    run_dir: Path
    name: str
    total_steps: int
    start_step: int = 0  # 0: a fresh start; n: resumed from the checkpoint of step n
    validation_due: bool = False  # the validation after start_step was cut short: it is done, and logged, in this job
    config: dict[str, Any] = field(default_factory=dict)
    model: str = ""  # one line, e.g. "nemotron4, 4 layers, hidden 256"
    parameters: int | None = None
    total_tokens: int | None = None  # of all steps, those of a ramp with smaller batches too
    layout: str = ""  # e.g. "fsdp, dp 2 x tp 2"
    peak: str = ""  # what MFU is measured against, `str(Peak)`


class Tracker(Protocol):
    """`start` once, `log` any number of times, `close` once."""

    def start(self, run: RunInfo) -> None: ...

    def log(self, row: Row) -> None: ...

    def close(self, status: str) -> None:
        """`status` is the run's state: finished, preempted or failed."""


class Record(Tracker, Protocol):
    """The tracker that keeps every row."""

    def drop_after(self, step: int) -> None:
        """Mark the rows past `step`, to which the run went back."""


class Trackers:
    """The record and the observers as one tracker. Without any it does nothing.

    A run must not continue without its record, so the record is written at once and its errors are raised. An observer neither
    ends nor delays a training: each works on a thread of its own, and one that raises or hangs is left out and reported to `on_loss`.
    `close` waits `PATIENCE_SECONDS` for them.
    """

    def __init__(
        self,
        record: Record | None = None,
        observers: Iterable[Tracker] = (),
        *,
        on_loss: Callable[[str], None] | None = None,
    ) -> None:
        self.record = record
        self.observers = list(observers)
        on_loss = on_loss or Lost()
        self._threads = [Background(type(observer).__name__, on_loss=on_loss) for observer in self.observers]

    def start(self, run: RunInfo) -> None:
        if self.record:
            self.record.start(run)  # first: observers read a resumed run's past from it
        self._observe(lambda observer: observer.start(run))

    def log(self, row: Row) -> None:
        if self.record:
            self.record.log(row)
        self._observe(lambda observer: observer.log(row))

    def drop_after(self, step: int) -> None:
        """The run went back to `step`: the record marks its later rows; observers are not notified and see the steps again."""
        if self.record:
            self.record.drop_after(step)

    def close(self, status: str) -> None:
        self._observe(lambda observer: observer.close(status))
        deadline = time.monotonic() + PATIENCE_SECONDS
        for thread in self._threads:
            thread.end()
        for thread in self._threads:
            thread.finish(deadline)
        if self.record:
            self.record.close(status)

    def _observe(self, action: Callable[[Tracker], None]) -> None:
        for observer, thread in zip(self.observers, self._threads):
            thread.call(partial(action, observer))


def flatten(row: Row) -> Row:
    """Nested dictionaries as `outer/inner` keys, which W&B and TensorBoard group; values of None are left out."""
    flat: Row = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat.update({f"{key}/{inner}": item for inner, item in flatten(value).items()})
        elif value is not None:
            flat[key] = value
    return flat
