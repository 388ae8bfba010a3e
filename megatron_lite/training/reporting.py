"""What a job says about itself: status.json and the trackers while it runs and at its end, and the text of a failure.

Whatever ends a training, an exception included, `reported` writes it down and closes the trackers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch.distributed as dist

from megatron_lite.errors import CheckpointError, TrainingFailedError, error_text
from megatron_lite.training.preemption import REACTION_SECONDS


class Reported(Protocol):
    """What is reported of a `Trainer`; its attributes of the same names (the trainer imports this module, not the other way)."""

    config: Any
    runtime: Any
    store: Any
    loader: Any
    tracker: Any
    status: Any
    watchdog: Any
    position: Any
    preemption: Any


@contextmanager
def reported(trainer: Reported) -> Iterator[None]:
    """Write to status.json and the trackers that the job is running and, whatever happens, how it ended.

    Raises TrainingFailedError for what a user can repair: a lost rank, a full disk, a value that does not fit.
    """
    write_status(trainer, "running", "")
    try:
        yield
    except BaseException as error:
        text = error_text(error)
        if lost := _is_lost_connection(error):
            first = trainer.watchdog.failed_first() or "see who ended first"
            text = f"rank {trainer.runtime.rank} lost another rank in {trainer.watchdog.phase}, {first}: {text}"
        trainer.watchdog.fail(text)
        if not trainer.watchdog.has_reported():
            write_status(trainer, "failed", text)
        with suppress(OSError):  # on a full disk: the error to show is the first one, not this
            trainer.tracker.close("failed")
        trainer.status.finish()
        if lost or isinstance(error, OSError | CheckpointError | ValueError):
            raise TrainingFailedError(_failure(trainer, text)) from error
        raise
    trainer.tracker.close(trainer.status.state)
    trainer.status.finish()


def write_end(trainer: Reported, outcome: str, *, saved: bool, save_seconds: float) -> str:
    """Write the end of a job to status.json; returns the outcome, `preempted` where the last step was not saved.

    outcome: finished, stopped (at `train.stop_at`) or preempted (by a signal).
    `grace_seconds` is what launchers must grant between a signal and the end: max(one step, 5 s) and the save, as this job
    measured them.
    """
    reason = {
        "finished": "all steps done",
        "stopped": f"train.stop_at={trainer.config.stop_at}",
        "preempted": str(trainer.preemption.signal),
    }[outcome]
    if trainer.position.validation_due:
        reason += "; the validation of this step is done on resume"
    if not saved:
        outcome = "preempted"
        reason += "; the last step was not finite and not saved, the same command continues from the newest checkpoint"
    grace = {"grace_seconds": math.ceil(max(trainer.preemption.step_seconds, REACTION_SECONDS) + save_seconds)}
    write_status(trainer, "finished" if outcome == "finished" else "preempted", reason, **(grace if saved else {}))
    return outcome


def write_status(trainer: Reported, state: str, reason: str, **more: float) -> None:
    """status.json at the trainer's position, with the share of every source seen so far."""
    position = trainer.position
    seen = trainer.loader.seen(position.consumed_samples)
    trainer.status.write(
        state, position.step, reason, blend_seen=seen, job=trainer.runtime.job, time=time.time(), **more
    )


def _failure(trainer: Reported, reason: str) -> str:
    steps = trainer.store.steps()
    saved = f"the newest checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint yet"
    return (
        f"step {trainer.position.step}, run.dir={trainer.store.directory.parent}: {reason}; {saved}: when this is repaired, "
        "the same command continues from it"
    )


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank's process ended: gloo raises a RuntimeError, NCCL and the store a DistError."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo/transport" in str(error))
