"""What every tracker can do, and what it is told about the run.

A tracker takes rows (plain dictionaries, see `megatron_lite.training.metrics`) and shows or keeps them. Notable:
  - rows are either training rows (they have `loss`) or validation rows (`val_loss: {source: loss}`, no `loss`);
  - the JSONL file is the record of the run and is always written; console and W&B are views added by choice;
  - only one process tracks: `build_tracker(..., main_process=False)` gives a tracker that does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]

KINDS = ("none", "console", "wandb")
WANDB_MODES = ("online", "offline", "disabled")


@dataclass
class TrackingConfig:
    """Choice of trackers beside the JSONL file (`tracking=none|console|wandb` on the command line)."""

    kind: str = "console"  # none: JSONL only | console: and the terminal | wandb: and Weights & Biases
    project: str = "megatron_lite"  # W&B project
    entity: str | None = None  # W&B user or team; None: the account's default
    name: str | None = None  # W&B display name; None: the run directory's name
    mode: str | None = None  # online | offline | disabled; None: online with an API key, offline without
    tags: list[str] = field(default_factory=list)  # W&B tags

    def validate(self) -> None:
        """Raise ValueError naming the key for a value that no tracker has."""
        if self.kind not in KINDS:
            raise ValueError(f"tracking.kind={self.kind} is unknown; choose one of {', '.join(KINDS)}")
        if self.mode is not None and self.mode not in WANDB_MODES:
            raise ValueError(
                f"tracking.mode={self.mode} is unknown; choose one of {', '.join(WANDB_MODES)}, "
                "or null to let the presence of an API key decide"
            )


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
    tokens_per_step: int | None = None  # at full batch size
    layout: str = ""  # e.g. "fsdp, dp 2 x tp 2"
    peak: str = ""  # what MFU is measured against, `str(Peak)`


class Tracker(Protocol):
    """`start` once, `log` any number of times, `close` once."""

    def start(self, run: RunInfo) -> None: ...

    def log(self, row: Row) -> None: ...

    def close(self, status: str) -> None:
        """`status` is the run's state: finished, preempted or failed."""


class Trackers:
    """Several trackers as one, called in order (closed in reverse). Without any it does nothing."""

    def __init__(self, trackers: Iterable[Tracker] = ()) -> None:
        self.trackers = list(trackers)

    def start(self, run: RunInfo) -> None:
        for tracker in self.trackers:
            tracker.start(run)

    def log(self, row: Row) -> None:
        for tracker in self.trackers:
            tracker.log(row)

    def close(self, status: str) -> None:
        for tracker in reversed(self.trackers):
            tracker.close(status)
