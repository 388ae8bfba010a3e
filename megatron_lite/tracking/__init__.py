"""Where a run's numbers go: a JSONL file always, the terminal and Weights & Biases by choice, a plot and a report."""

from __future__ import annotations

from megatron_lite.tracking.base import Row, RunInfo, Tracker, Trackers, TrackingConfig
from megatron_lite.tracking.console import ConsoleTracker
from megatron_lite.tracking.jsonl import JsonlTracker, read_rows
from megatron_lite.tracking.plot import write_loss_plot
from megatron_lite.tracking.report import write_report
from megatron_lite.tracking.wandb import WandbTracker

__all__ = [
    "ConsoleTracker",
    "JsonlTracker",
    "Row",
    "RunInfo",
    "Tracker",
    "Trackers",
    "TrackingConfig",
    "WandbTracker",
    "build_tracker",
    "read_rows",
    "write_loss_plot",
    "write_report",
]


def build_tracker(config: TrackingConfig, *, main_process: bool = True, has_key: bool = False) -> Trackers:
    """The trackers of `config`, JSONL first: the others read a resumed run's past from its file.

    main_process: False on all ranks but one; they get a tracker that does nothing.
    has_key: whether a W&B API key is at hand (the environment is the caller's business).
    """
    config.validate()
    if not main_process:
        return Trackers()
    trackers: list[Tracker] = [JsonlTracker()]
    if config.kind in ("console", "wandb"):
        trackers.append(ConsoleTracker())
    if config.kind == "wandb":
        trackers.append(WandbTracker(config, has_key=has_key))
    return Trackers(trackers)
