"""What a run does about spikes (`train.on_spike`).

    ignore      nothing; only updates that are not finite are left out
    skip        the update of a spike is left out
    rollback    skip, and once the host reads of it the run goes back to a checkpoint of before and reads on behind the spike's samples
    stop        skip, and once the host reads of it the run fails

The host reads with the row that is logged anyway, at multiples of `train.log_every`, which do not depend on where a run was stopped.
A rollback goes to the newest checkpoint at least `spike.window` steps older than the spike, so that the weights are of before whatever
led to it. Its position, with `consumed_samples` behind the last spiking sample, is saved before the next step in place of that
checkpoint. Whenever the job is killed, the next one either finds that, or comes to the same spike again.
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


class Trained(Protocol):
    """What a rollback needs of a `Trainer` (which imports this module, not the other way)."""

    runtime: Any
    position: Any
    schedule: Any
    spikes: SpikeGuard
    store: Any
    tracker: Any
    metrics: Any

    @property
    def schedule_from(self) -> Callable[[Progress], Any]: ...

    def restore(self, path: Any) -> None: ...

    def write_checkpoint(self) -> None: ...


def roll_back(trainer: Trained, spikes: Spikes) -> bool:
    """Go back to before the spikes and on behind them. False where there is no checkpoint to go back to: training goes on.

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
