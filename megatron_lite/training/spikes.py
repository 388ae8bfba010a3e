"""What a run does about spikes (`train.on_spike`).

    ignore      nothing; only updates that are not finite are left out
    skip        the update of a spike is left out
    rollback    skip; once the host has read of it, the run returns to an earlier checkpoint and continues after the spike's samples
    stop        skip; once the host has read of it, the run fails

The device decides whether a step is a spike. The host reads this with the row that is logged anyway, at multiples of
`train.log_every`, which do not depend on where a run was stopped. A rollback returns to the newest checkpoint at least
`spike.window` steps older than the spike, so that the weights are older than whatever led to it. Before the next step, that
checkpoint is replaced by one whose `consumed_samples` is after the last spiking sample. So a job that is killed at any moment is
followed by one that finds this checkpoint, or meets the same spike again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from megatron_lite.errors import TrainingDivergedError
from megatron_lite.optim.schedule import Progress
from megatron_lite.optim.spikes import Judge, SpikeConfig, SpikeDetector, Spikes, not_finite
from megatron_lite.training.ladder import OnLadder, climb_down

MODES = ("ignore", "skip", "rollback", "stop")


@dataclass
class SpikeGuard:
    """mode: one of MODES. skipped_samples: the rollbacks of the run so far, kept in every manifest."""

    mode: str
    config: SpikeConfig
    device: torch.device
    skipped_samples: list[dict[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.detector = None if self.mode == "ignore" else SpikeDetector(self.config, device=self.device)

    def judge(self, at: Progress) -> Judge:
        """The judge of the step that ends at `at`."""
        return self.detector.judge(at) if self.detector else not_finite

    def read(self) -> Spikes | None:
        """The spikes since the last time. Waits for the device."""
        return self.detector.read() if self.detector else None

    def state(self) -> dict[str, Any]:
        """For the manifest."""
        found: dict[str, Any] = {"skipped_samples": self.skipped_samples}
        return found | ({"spikes": self.detector.state()} if self.detector else {})

    def load_state(self, manifest: dict[str, Any]) -> None:
        """What `state` gave, or nothing where the checkpoint's run did not look for spikes. Raises ValueError."""
        known = {tuple(sorted(entry.items())) for entry in self.skipped_samples}
        self.skipped_samples += [e for e in manifest["skipped_samples"] if tuple(sorted(e.items())) not in known]
        if self.detector and "spikes" in manifest:
            self.detector.load_state(manifest["spikes"])


class Trained(OnLadder, Protocol):
    """What this needs of a `Trainer` (which imports this module, not the other way)."""

    config: Any
    spikes: SpikeGuard
    skips: Any
    store: Any
    tracker: Any
    metrics: Any
    watchdog: Any
    preemption: Any

    @property
    def schedule_from(self) -> Callable[[Progress], Any]: ...

    def restore(self, path: Any) -> None: ...

    def write_checkpoint(self) -> None: ...


def look_into_spikes(trainer: Trained, row: dict[str, Any]) -> Spikes | None:
    """The spikes since the last row, put into `row` with what the ladder finds and does about them."""
    spikes = trainer.spikes.read()
    if spikes:
        row["spikes"] = spikes.count
    hopeless = _is_hopeless(trainer)
    if spikes or hopeless:
        position = trainer.position
        trainer.watchdog.enter("look into a spike", position.step)
        with trainer.metrics.paused():
            skips = int(trainer.skips.item())
            event = spikes or Spikes(skips, position.step - skips + 1, position.consumed_samples)
            found, fell = climb_down(trainer, event, at_once=hopeless)
        row |= found
        if fell:  # the next rung may skip as often again
            trainer.skips.zero_()
    return spikes


def act_on_spikes(trainer: Trained, spikes: Spikes | None) -> bool:
    """What the mode says; returns whether the run went back. Raises TrainingDivergedError where it cannot go on."""
    mode, step = trainer.spikes.mode, trainer.position.step
    if spikes and mode == "rollback":
        trainer.watchdog.enter("roll back", step)
        with trainer.metrics.paused():
            if roll_back(trainer, spikes):
                trainer.preemption.resume()
                return True
    if spikes and mode == "stop":
        raise TrainingDivergedError(
            f"{spikes.count} spike(s) from step {spikes.first_step} on, and train.on_spike=stop: look at the samples before "
            f"{spikes.end_sample}, or choose skip, rollback or ignore"
        )
    if _is_hopeless(trainer):
        what = "a finite loss or gradient" + (", or with a spike" if mode != "ignore" else "")
        raise TrainingDivergedError(
            f"{int(trainer.skips.item())} steps in a row without {what}, the last one step {step}: lower optim.lr, lengthen "
            "schedule.warmup_steps, or resume from an earlier checkpoint (train.max_skipped_steps sets how many are allowed)"
        )
    return False


def _is_hopeless(trainer: Trained) -> bool:
    """Whether so many updates in a row were skipped that the run must not continue."""
    return bool(trainer.skips.item() >= trainer.config.max_skipped_steps)


def roll_back(trainer: Trained, spikes: Spikes) -> bool:
    """Return to a checkpoint before the spikes and continue with the samples after them. False if there is no such checkpoint.

    Raises TrainingDivergedError after too many rollbacks.
    """
    guard, now = trainer.spikes, trainer.position.step
    config = guard.config
    recent = [entry for entry in guard.skipped_samples if entry["step"] > spikes.first_step - config.within_steps]
    if len(recent) >= config.max_rollbacks:
        raise TrainingDivergedError(
            f"a spike at step {spikes.first_step}, and the run has gone back {len(recent)} times within {config.within_steps} steps "
            "already (spike.max_rollbacks, spike.within_steps): lower optim.lr, or look at the data behind sample "
            f"{spikes.end_sample}"
        )
    every = trainer.store.config.every
    steps = [step for step in trainer.store.recovered_steps() if step <= spikes.first_step - config.window]
    path = trainer.store.newest_of([step for step in steps if every and step % every == 0])
    if path is None:
        _say(
            trainer,
            f"a spike at step {spikes.first_step} and no checkpoint at least spike.window={config.window} steps older: its update "
            "was left out, training goes on",
        )
        return False
    trainer.restore(path)
    position = trainer.position
    skipped = {"step": spikes.first_step, "end": spikes.end_sample, "back_to": position.step}
    known = any(skipped.items() <= entry.items() for entry in guard.skipped_samples)
    if not known:  # else a job was killed in this very rollback
        guard.skipped_samples.append(skipped | {"start": position.consumed_samples})
    position.consumed_samples = spikes.end_sample  # not the tokens: with train.max_tokens, skipped ones do not count
    trainer.schedule = trainer.schedule_from(replace(position))
    trainer.metrics.restart(position.consumed_samples)
    trainer.write_checkpoint()
    trainer.store.wait()
    trainer.tracker.drop_after(position.step)
    trainer.store.abandon_after(position.step)
    _say(
        trainer,
        f"a spike at step {spikes.first_step}: after step {now} the run went back to step {position.step} and goes on from sample "
        f"{spikes.end_sample}",
    )
    return True


def _say(trainer: Trained, text: str) -> None:
    if trainer.runtime.is_main:
        warnings.warn(text, stacklevel=3)
