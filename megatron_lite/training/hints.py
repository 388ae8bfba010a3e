"""Hints on how to continue a finished run."""

from __future__ import annotations

from pathlib import Path

from megatron_lite.errors import CheckpointError
from megatron_lite.training.resume import progress_of
from megatron_lite.training.trainer import Trainer


def how_to_lengthen(trainer: Trainer, directory: Path) -> str:
    """How to train the finished run in `directory` for twice its length.

    Where the learning rate has decayed, a longer run continues from the newest checkpoint at the peak: from the last one the rate
    would jump up again.
    """
    schedule, config = trainer.schedule, trainer.config
    if config.max_steps is not None:
        longer = f"train.max_steps={2 * config.max_steps}"
    else:
        longer = f"train.max_tokens={2 * (config.max_tokens or 0)}"
    last = schedule.rate(trainer.position)
    if last >= schedule.lr.peak:
        return f"the same command with {longer}: continues to twice the length"
    before = newest_at_peak(trainer)
    if before is None:
        return (
            f"the same command with {longer}: continues to twice the length, but the learning rate, now {last:.2e}, jumps up again, "
            "because no checkpoint from before its decay is left (checkpoint.keep_every keeps some)"
        )
    return (
        f"the same command with resume={before} run.dir={directory}_longer {longer}: twice the length, from before the decay of the "
        "learning rate"
    )


def newest_at_peak(trainer: Trainer) -> Path | None:
    """The newest checkpoint whose learning rate is the schedule's peak; None where none is left."""
    store, schedule = trainer.store, trainer.schedule
    for step in reversed(store.steps()):
        try:
            there = progress_of(store.read_manifest(step))
        except CheckpointError:  # a damaged one cannot be continued
            continue
        if schedule.rate(there) >= schedule.lr.peak:
            return store.path(step)
    return None
