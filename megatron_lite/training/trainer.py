"""The training loop: when to step, log, validate, save and stop. How a step runs is the engine's business.

Notable features:
- `Trainer.fit` is the only loop, the same for every engine, layout and objective.
- The state of a run is the engine's tensors and a few integers (`Position`); a checkpoint's manifest holds these and, for the
  record and for the checks at a resume, the config and the state of the blend.
- Nothing in the loop waits for the device unless a row is written or a checkpoint is saved.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lite.checkpoint.store import CheckpointStore
from megatron_lite.data.loader import DataLoader
from megatron_lite.data.packing import Batch
from megatron_lite.engine.base import Engine
from megatron_lite.errors import CheckpointError, TrainingDivergedError, TrainingFailedError, error_text
from megatron_lite.optim.schedule import BatchSize, RampStage, Schedule
from megatron_lite.parallel.global_view import State
from megatron_lite.runtime import Runtime, Signals
from megatron_lite.tracking.base import Tracker
from megatron_lite.tracking.profile import Profiler
from megatron_lite.training.metrics import Metrics
from megatron_lite.training.rng import rng_state, set_rng_state
from megatron_lite.training.status import Status
from megatron_lite.training.watchdog import Watchdog


@dataclass
class TrainConfig:
    """How long, how large, how often. `max_steps` or `max_tokens` is the length that schedule and phases refer to."""

    max_steps: int | None = None
    max_tokens: int | None = None
    stop_at: int | None = None  # this job saves and exits 0 after that step; the length of the run stays
    global_batch_size: int = 8
    micro_batch_size: int = 8
    batch_ramp: list[RampStage] = field(default_factory=list)
    log_every: int = 1
    eval_every: int = 0  # 0: at the end only
    max_skipped_steps: int = 5  # non-finite steps in a row before the run fails
    threads: int | None = None  # CPU threads of a process; null leaves the choice to torch
    deterministic: bool = False

    def validate(self) -> None:
        """Raise ValueError naming the key whose value cannot be."""
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ValueError(
                f"train.max_steps={self.max_steps}, train.max_tokens={self.max_tokens}: set exactly one of them"
            )
        for key in (
            "max_steps", "max_tokens", "stop_at", "global_batch_size", "micro_batch_size", "log_every",
            "max_skipped_steps", "threads",
        ):  # fmt: skip
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"train.{key}={value} must be at least 1")
        if (self.threads or 0) > 1024:  # no machine has as many cores; torch would try to start them all
            raise ValueError(f"train.threads={self.threads} must be at most 1024")
        if self.eval_every < 0:
            raise ValueError(f"train.eval_every={self.eval_every} must not be negative; 0 validates at the end only")
        BatchSize(self.global_batch_size, self.batch_ramp)


@dataclass
class Position:
    """Where a run stands."""

    step: int = 0
    consumed_samples: int = 0


@dataclass
class Trainer:
    """What a run consists of, put together by `build.build_trainer`."""

    config: TrainConfig
    runtime: Runtime
    engine: Engine
    schedule: Schedule
    loader: DataLoader
    store: CheckpointStore
    tracker: Tracker
    metrics: Metrics
    status: Status
    profiler: Profiler
    watchdog: Watchdog
    base_manifest: dict[str, Any]  # the part of every manifest that a run never changes
    position: Position = field(default_factory=Position)

    def fit(self) -> str:
        """Train to the end, `stop_at` or a signal; returns finished, stopped or preempted. A failure raises."""
        batch, end = self.schedule.batch, self.schedule.total_samples
        if self.config.stop_at is not None:
            end = min(end, batch.samples(self.config.stop_at))
        skips = torch.zeros((), device=self.runtime.device)
        outcome, saved = "stopped", True
        self.metrics.start()
        self.watchdog.enter("data", self.position.step + 1)
        with self._reported(), Signals() as signals, closing(self._steps(end)) as steps:
            for size, micro_batches in steps:
                self.position.step += 1
                self.position.consumed_samples += size
                step, consumed = self.position.step, self.position.consumed_samples
                lr = self.schedule.rate(step=step, consumed_samples=consumed)
                self.watchdog.enter("train_step", step)
                result = self.engine.train_step(micro_batches, lr=lr)
                skips = (skips + result.skipped) * result.skipped
                self.watchdog.enter("agree", step)
                outcome = self._outcome(signals, consumed, end)
                self.watchdog.enter("log", step)
                row = self.metrics.update(
                    result, step=step, consumed_samples=consumed, lr=lr, last=outcome != "running"
                )
                if row:
                    self.tracker.log(row)
                    self._give_up_after(skips)
                if self._due(self.config.eval_every) or outcome == "finished":
                    self.validate()
                if self._due(self.store.config.every) or outcome != "running":
                    saved = self.save(skips)
                if outcome != "running":
                    break
                self.watchdog.enter("data", step + 1)
            self.store.wait()
            reasons = {
                "finished": "all steps done",
                "stopped": f"train.stop_at={self.config.stop_at}",
                "preempted": str(signals.requested),
            }
            reason = reasons[outcome]
            if not saved:
                outcome = "preempted"
                reason += (
                    "; the last step was not finite and not saved, the same command goes on from the newest checkpoint"
                )
            self._write_status("finished" if outcome == "finished" else "preempted", reason)
            self.watchdog.end()
        return outcome

    def declare_finished(self) -> None:
        """For a run whose last checkpoint is there: whoever reads status.json shall know that nothing is left to do."""
        self._write_status("finished", "all steps done")

    def _steps(self, end: int) -> Generator[tuple[int, list[Batch]], None, None]:
        steps = self.loader.steps(self.position.consumed_samples, self.schedule.batch.at, end)
        yield from self.profiler.watch(steps)

    def restore(self, path: Path) -> None:
        """Take over tensors, counters and random generators of a checkpoint. Raises CheckpointError or ValueError."""
        self.watchdog.enter(f"restore {path.name}", 0)
        state = self.engine.state()
        manifest = self.store.load(path, state.tensors)
        self.engine.load_state(State(state.tensors, manifest["counters"]))
        self.position = Position(manifest["step"], manifest["consumed_samples"])
        set_rng_state(manifest["rng"])

    def validate(self) -> dict[str, float]:
        """Mean loss on the held-out batches of every source, logged as one row."""
        losses = {}
        with self.metrics.paused():
            for source, batches in self.loader.validation():
                sums = torch.zeros(2, dtype=torch.float64, device=self.runtime.device)
                for item in batches:
                    self.watchdog.enter(f"validate {source}", self.position.step)
                    sums += torch.stack([value.double() for value in self.engine.evaluate(item)])
                total, tokens = self.runtime.sum(sums).tolist()
                losses[source] = total / max(tokens, 1.0)
            self.tracker.log({"step": self.position.step, "val_loss": losses})
        return losses

    def save(self, skips: torch.Tensor) -> bool:
        """Write a checkpoint of this step, unless the last step was not finite: such weights must not become the newest.

        Returns whether it did.
        """
        if skips.item() > 0:
            warnings.warn(f"step {self.position.step} had no finite loss or gradient: not saved", stacklevel=2)
            return False
        self.watchdog.enter("save", self.position.step)
        with self.metrics.paused():
            state = self.engine.state()
            manifest = {
                **self.base_manifest,
                "consumed_samples": self.position.consumed_samples,
                "counters": state.counters,
                "rng": rng_state(),
            }
            self.store.save(self.position.step, state.tensors, manifest)
        return True

    def _outcome(self, signals: Signals, consumed: int, end: int) -> str:
        if consumed >= self.schedule.total_samples:
            return "finished"
        if consumed >= end:
            return "stopped"
        return "preempted" if self.runtime.any(signals.requested is not None) else "running"

    def _due(self, every: int) -> bool:
        return bool(every) and self.position.step % every == 0

    def _give_up_after(self, skips: torch.Tensor) -> None:
        if skips.item() >= self.config.max_skipped_steps:
            raise TrainingDivergedError(
                f"{int(skips.item())} steps in a row without a finite loss or gradient, the last one step "
                f"{self.position.step}: lower optim.lr, lengthen schedule.warmup_steps, or resume from an earlier "
                "checkpoint (train.max_skipped_steps sets how many are borne)"
            )

    def _write_status(self, state: str, reason: str) -> None:
        seen = self.loader.seen(self.position.consumed_samples)
        self.status.write(state, self.position.step, reason, blend_seen=seen, job=self.runtime.job, time=time.time())

    def _lost(self, reason: str) -> str:
        steps = self.store.steps()
        saved = f"the checkpoint of step {steps[-1]} is there" if steps else "no checkpoint is there yet"
        return (
            f"step {self.position.step}, run.dir={self.store.directory.parent}: {reason}; {saved}: when this is "
            "mended, the same command goes on from it"
        )

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """status.json and the trackers learn how it ended, whatever happens."""
        self._write_status("running", "")
        try:
            yield
        except BaseException as error:
            text = error_text(error)
            if lost := _is_lost_connection(error):
                text = (
                    f"rank {self.runtime.rank} lost another rank in {self.watchdog.phase}, see who ended first: {text}"
                )
            if not self.watchdog.has_spoken():
                with suppress(OSError):  # a full disk: what is to be said is the first error, not this one
                    self._write_status("failed", text)
            with suppress(OSError):
                self.tracker.close("failed")
            if lost or isinstance(error, OSError | CheckpointError | ValueError):
                raise TrainingFailedError(self._lost(text)) from error
            raise
        self.tracker.close(self.status.state)


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective ended because another rank's process did: gloo says so as a RuntimeError, NCCL and the store as DistError."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo/transport" in str(error))
