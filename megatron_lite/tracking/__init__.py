"""Where a run's numbers go: metrics.jsonl always; console, TensorBoard and W&B by choice; plot and report at its end."""

from __future__ import annotations

from collections.abc import Callable

from megatron_lite.tracking.base import Row, RunInfo, Tracker, Trackers, TrackingConfig, WandbConfig
from megatron_lite.tracking.console import ConsoleTracker
from megatron_lite.tracking.jsonl import JsonlTracker, read_rows
from megatron_lite.tracking.plot import write_loss_plot
from megatron_lite.tracking.report import write_report
from megatron_lite.tracking.tensorboard import TensorBoardTracker
from megatron_lite.tracking.wandb import WandbTracker

__all__ = [
    "ConsoleTracker",
    "JsonlTracker",
    "Row",
    "RunInfo",
    "TensorBoardTracker",
    "Tracker",
    "Trackers",
    "TrackingConfig",
    "WandbConfig",
    "WandbTracker",
    "build_tracker",
    "read_rows",
    "write_loss_plot",
    "write_report",
]


def build_tracker(
    config: TrackingConfig, *, main_process: bool = True, on_loss: Callable[[str], None] | None = None
) -> Trackers:
    """The record and the observers of `config`.

    main_process: False on all ranks but one; they get a tracker that does nothing.
    on_loss: called when an observer is disabled; by default a warning is printed.
    Raises ValueError if a value is invalid or a package is missing.
    """
    config.validate()
    if not main_process:
        return Trackers()
    observers: list[Tracker] = []
    if config.wandb.enabled:
        observers.append(WandbTracker(config.wandb))
    if config.tensorboard:
        observers.append(TensorBoardTracker())
    if config.console:  # last: its closing table comes below what the others print
        observers.append(ConsoleTracker())
    return Trackers(JsonlTracker(), observers, on_loss=on_loss)
