"""The training loop: when to step, log, validate, save and stop. The engine runs the steps.

Notable features:
- `Trainer.fit` is the only loop, the same for every engine, layout and objective.
- The state of a run is the engine's tensors and a few integers (`Position`); a checkpoint's manifest holds these and, for the
  record and for the checks at a resume, the config and the state of the blend.
- Nothing in the loop waits for the device unless a row is written or a checkpoint is saved, and the loop does not add a
  collective over all hosts to every step (see `preemption`).
- A signal is noticed during validation too: the checkpoint is saved at once and the validation is done from its start on resume.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint.store import CheckpointStore
from megatron_lite.data.loader import DataLoader
from megatron_lite.data.packing import Batch
from megatron_lite.data.token_bytes import bits_per_byte
from megatron_lite.engine.base import Engine, StepResult
from megatron_lite.optim.schedule import BatchSize, Progress, RampStage, Schedule
from megatron_lite.optim.spikes import not_finite
from megatron_lite.parallel.global_view import State
from megatron_lite.precision.numerics import STATE
from megatron_lite.runtime import Runtime, Signals
from megatron_lite.tracking.base import Tracker
from megatron_lite.tracking.profile import Profiler
from megatron_lite.training.ladder import Ladder
from megatron_lite.training.metrics import Metrics
from megatron_lite.training.preemption import Preemption
from megatron_lite.training.reporting import reported, write_end, write_status
from megatron_lite.training.rng import rng_state, set_rng_state
from megatron_lite.training.spikes import MODES, SpikeGuard, act_on_spikes, look_into_spikes
from megatron_lite.training.status import Status
from megatron_lite.training.watchdog import Watchdog


@dataclass
class TrainConfig:
    """How long, how large, how often. `max_steps` or `max_tokens` is the length that schedule and phases refer to.

    A run ends at `max_steps`, or at the first step that reaches `max_tokens`, whatever the batch sizes were before.
    """

    max_steps: int | None = None
    max_tokens: int | None = None
    stop_at: int | None = None  # this job saves and exits 0 when so many steps are done; the length of the run stays
    validate_only: bool = False  # check the config for WORLD_SIZE ranks, exit with 0 or 2, touch nothing
    global_batch_size: int = 8
    micro_batch_size: int = 8
    batch_ramp: list[RampStage] = field(default_factory=list)
    log_every: int = 1
    eval_every: int = 0  # 0: at the end only
    eval_at_start: bool = False  # also before the first step
    on_spike: str = "ignore"  # ignore | skip | rollback | stop: see training/spikes.py
    max_skipped_steps: int = 5  # non-finite steps in a row before the run fails
    threads: int | None = None  # CPU threads of a process; null leaves the choice to torch
    deterministic: bool = False

    def validate(self) -> None:
        """Raise ValueError naming the key if a value is invalid."""
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
        if self.on_spike not in MODES:
            raise ValueError(f"train.on_spike={self.on_spike} is unknown; choose one of {', '.join(MODES)}")
        BatchSize(self.global_batch_size, self.batch_ramp)


@dataclass
class Position(Progress):
    """Where a run stands. validation_due: the validation after `step` was cut short and has to be done again."""

    validation_due: bool = False


@dataclass(frozen=True)
class LastSave:
    """When the newest save began, and whether there was one (see `Trainer.save`)."""

    began: float
    done: bool = True


@dataclass
class Trainer:
    """What a run consists of, put together by `build.build_trainer`."""

    config: TrainConfig
    runtime: Runtime
    engine: Engine
    schedule: Schedule
    schedule_from: Callable[[Progress], Schedule]  # the same of a run that stands elsewhere
    loader: DataLoader
    store: CheckpointStore
    tracker: Tracker
    metrics: Metrics
    status: Status
    profiler: Profiler
    watchdog: Watchdog
    spikes: SpikeGuard
    ladder: Ladder
    base_manifest: dict[str, Any]  # the part of every manifest that a run never changes
    position: Position = field(default_factory=Position)
    preemption: Preemption = field(init=False)
    last_save: LastSave = field(init=False)
    skips: torch.Tensor = field(init=False)  # updates in a row that were left out, on the device

    def __post_init__(self) -> None:
        self.skips = torch.zeros((), device=self.runtime.device)

    def fit(self) -> str:
        """Train to the end, `stop_at` or a signal; returns finished, stopped or preempted. A failure raises."""
        with reported(self), Signals() as signals:
            self.preemption = Preemption(self.runtime, signals)
            self.last_save = LastSave(time.monotonic())
            due = self.position.validation_due or (self.config.eval_at_start and self.position.step == 0)
            outcome = "rolled back"
            while outcome == "rolled back":
                outcome = self._outcome()
                with closing(self._batches()) as batches:
                    if due:
                        outcome = self.validate(outcome)
                    self.metrics.start()
                    outcome = self._train(batches, outcome)
                due = self.position.validation_due
            self.store.wait()
            seconds = time.monotonic() - self.last_save.began
            outcome = write_end(self, outcome, saved=self.last_save.done, save_seconds=seconds)
            self.watchdog.end()
        return outcome

    def _train(self, batches: Iterator[tuple[int, list[Batch]]], outcome: str) -> str:
        """Step, log, validate and save while the outcome is `running`; returns the one that ends it, maybe `rolled back`."""
        while outcome == "running":
            result, lr = self._step(batches)
            self.skips = (self.skips + result.skipped) * result.skipped
            outcome = self._outcome(ask=True)
            if self._log(result, lr=lr, outcome=outcome):
                return "rolled back"
            if self._due(self.config.eval_every) or outcome == "finished":
                outcome = self.validate(outcome)
            if self._due(self.store.config.every) or outcome != "running":
                self.last_save = LastSave(time.monotonic(), done=self.save(result))
        return outcome

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do: every step is done, and the validation after the last one."""
        return self.position.step >= self.schedule.total_steps and not self.position.validation_due

    def _batches(self) -> Generator[tuple[int, list[Batch]], None, None]:
        end = self.schedule.end_of_job(self.config.stop_at).consumed_samples
        yield from self.profiler.watch(
            self.loader.steps(self.position.consumed_samples, self.schedule.projection.batch.at, end)
        )

    def _step(self, batches: Iterator[tuple[int, list[Batch]]]) -> tuple[StepResult, float]:
        """One step of the optimizer; returns its result, still on the device, and its learning rate."""
        self.watchdog.enter("data", self.position.step + 1)
        size, micro_batches = next(batches)
        self.position.step += 1
        self.position.consumed_samples += size
        self.position.consumed_tokens += size * self.schedule.projection.seq_len
        lr = self.schedule.rate(self.position)
        self.watchdog.enter("train_step", self.position.step)
        return self.engine.train_step(micro_batches, lr=lr, judge=self.spikes.judge(self.position)), lr

    def _outcome(self, *, ask: bool = False) -> str:
        """What follows from the position, and, if the ranks are to be asked, from a signal: running means one more step."""
        if self.position.step >= self.schedule.total_steps:
            return "finished"
        if self.config.stop_at is not None and self.position.step >= self.config.stop_at:
            return "stopped"
        if not ask:
            return "running"
        self.watchdog.enter("agree", self.position.step)
        return "preempted" if self.preemption.requested_after("step") else "running"

    def _log(self, result: StepResult, *, lr: float, outcome: str) -> bool:
        """Write a row if one is due, and react to the spikes in it; returns whether that took the run back."""
        self.watchdog.enter("log", self.position.step)
        row = self.metrics.update(result, at=self.position, lr=lr, last=outcome != "running")
        if not row:
            return False
        if not (self._due(self.config.log_every) or outcome == "finished"):  # the row of a signal or of stop_at
            self.tracker.log(row)
            return False
        spikes = look_into_spikes(self, row)
        self.tracker.log(row)
        return act_on_spikes(self, spikes)

    def _due(self, every: int) -> bool:
        return every > 0 and self.position.step % every == 0

    def validate(self, outcome: str) -> str:
        """Log the mean loss on the held-out batches of every source as one row.

        A signal before or during validation postpones it until the run is resumed. Then `preempted` is returned instead of
        `running` or `finished`, because the validation still has to be done.
        """
        self.position.validation_due = True
        losses = {}
        with self.metrics.paused():
            for source, batches in self.loader.validation():
                sums = torch.zeros(2, dtype=torch.float64, device=self.runtime.device)
                for item in batches:
                    if self.preemption.signal:
                        return outcome if outcome == "stopped" else "preempted"
                    self.watchdog.enter(f"validate {source}", self.position.step)
                    sums += torch.stack([value.double() for value in self.engine.evaluate(item)])
                    self.preemption.requested_after("validation batch")
                total, tokens = self.runtime.sum(sums).tolist()
                losses[source] = total / max(tokens, 1.0)
        bits = bits_per_byte(losses, self.loader.held_out.bytes_per_token)
        self.tracker.log({"step": self.position.step, "val_loss": losses, "bits_per_byte": bits})
        self.position.validation_due = False
        return "preempted" if self.preemption.signal and outcome == "running" else outcome

    def save(self, last: StepResult) -> bool:
        """Write a checkpoint of this step, unless the last step was not finite: such weights must not become the newest.

        Returns whether it did.
        """
        if not_finite(last.loss, last.grad_norm).item():
            warnings.warn(f"step {self.position.step} had no finite loss or gradient: not saved", stacklevel=2)
            return False
        self.write_checkpoint()
        self.preemption.resume()
        return True

    def write_checkpoint(self) -> None:
        """Write a checkpoint of the position; with `checkpoint.async_save` it may be on its way when this returns."""
        self.watchdog.enter("save", self.position.step)
        with self.metrics.paused():
            state = self.engine.state()
            manifest = {
                **self.base_manifest,
                **self.spikes.state(),
                **self.ladder.state(),
                "skipped_in_a_row": int(self.skips.item()),
                "consumed_samples": self.position.consumed_samples,
                "consumed_tokens": self.position.consumed_tokens,
                "validation_due": self.position.validation_due,
                "counters": state.counters,
                "rng": rng_state(),
            }
            self.store.save(self.position.step, state.tensors, manifest)

    def restore(self, path: Path) -> None:
        """Take over tensors, counters and random generators of a checkpoint. Raises CheckpointError or ValueError."""
        self.watchdog.enter(f"restore {path.name}", 0)
        state = self.engine.state()
        for name, piece in state.tensors.items():
            # a checkpoint of another precision may not hold it: then it starts afresh
            if (kind := name.split(".", 1)[0]) in STATE:
                piece.tensor().fill_(STATE[kind])
        manifest = self.store.load(path, state.tensors, optional=tuple(STATE))
        self.engine.load_state(State(state.tensors, manifest["counters"]))
        due = bool(manifest.get("validation_due"))
        done = manifest["step"], manifest["consumed_samples"], manifest["consumed_tokens"]
        self.position = Position(*done, validation_due=due)
        self.spikes.load_state(manifest)
        self.ladder.load_state(manifest)
        self.skips.fill_(manifest.get("skipped_in_a_row", 0))
        set_rng_state(manifest["rng"])

    def declare_finished(self) -> None:
        """Write status.json for a run whose last checkpoint exists: a job may have been killed between the two."""
        write_status(self, "finished", "all steps done")
        self.status.finish()
