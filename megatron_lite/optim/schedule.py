"""Learning rate and batch size as pure functions of progress.

Notable features:
- Nothing is stored: the learning rate is a function of the step (or of the tokens) that the update completes, the batch size
  of `consumed_samples`; a resumed run needs no state of either.
- WSD (warm-up, stable, decay; Hu et al. 2024): lr = max until the decay starts, then min + c(r) (max - min) with r the
  fraction of the decay that is done and c one of the shapes in `DECAY_SHAPES`.
- cosine is the same with the decay over everything after the warm-up.
- `train` gives the length of a run in steps or in tokens. The other unit is projected from the current position and the
  remaining batch sizes (`Projection`), so a change of the batch size during a run changes neither its end nor its final
  learning rate.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, field

DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda r: 1.0 - r,
    "cosine": lambda r: 0.5 * (1.0 + math.cos(math.pi * r)),
    "exponential": lambda r: 2.0 * 0.5**r - 1.0,
    "one_minus_sqrt": lambda r: 1.0 - math.sqrt(r),
}
"""c(r), from 1 at r=0 to 0 at r=1."""


@dataclass
class ScheduleConfig:
    """name: constant | cosine | wsd. Lengths are in `unit`s (steps or tokens); the total length is that of `train`.

    `decay` is the length of WSD's last part, alternatively `decay_fraction` of the total length. `decay_shape` is one of
    DECAY_SHAPES, or quarter_cosine: max(min_lr, lr cos(pi r / 2)), which has no min_lr inside its formula.
    `start_lr` takes the place of the peak (optim.lr) in a run that starts where the decay of another run ended; null = the peak.
    """

    name: str = "cosine"
    unit: str = "steps"
    warmup_steps: int = 0
    warmup_tokens: int = 0
    min_lr: float = 0.0
    decay: int | None = None
    decay_fraction: float | None = None
    decay_shape: str = "linear"
    start_lr: float | None = None

    def validate(self) -> None:
        """Raise ValueError naming the key if a value is invalid."""
        shapes = [*DECAY_SHAPES, "quarter_cosine"]
        for key, value, known in (
            ("name", self.name, ["constant", "cosine", "wsd"]),
            ("unit", self.unit, ["steps", "tokens"]),
            ("decay_shape", self.decay_shape, shapes),
        ):
            if value not in known:
                raise ValueError(f"schedule.{key}={value} is unknown; choose one of {', '.join(known)}")
        other = "warmup_tokens" if self.unit == "steps" else "warmup_steps"
        if getattr(self, other):
            raise ValueError(f"schedule.{other} has no meaning with schedule.unit={self.unit}; set one of the two")
        for key in ("min_lr", "warmup_steps", "warmup_tokens", "decay"):
            if (getattr(self, key) or 0) < 0:
                raise ValueError(f"schedule.{key}={getattr(self, key)} must not be negative")
        if self.decay is not None and self.decay_fraction is not None:
            raise ValueError(
                f"schedule.decay={self.decay} and schedule.decay_fraction={self.decay_fraction} exclude each other; set one to null"
            )
        if self.decay_fraction is not None and not 0 < self.decay_fraction <= 1:
            raise ValueError(f"schedule.decay_fraction={self.decay_fraction} must be in (0, 1]")
        if self.name != "wsd":
            for key, unset in (("decay", None), ("decay_fraction", None), ("decay_shape", "linear")):
                if getattr(self, key) != unset:
                    raise ValueError(
                        f"schedule.{key}={getattr(self, key)} has no meaning with schedule={self.name}; choose schedule=wsd, or "
                        f"set it back to {'null' if unset is None else unset}"
                    )
        if self.start_lr is not None and self.warmup:
            raise ValueError(
                f"schedule.start_lr={self.start_lr} and schedule.warmup_{self.unit}={self.warmup} exclude each other; set one of them to "
                "0 or null"
            )
        if self.name == "wsd" and self.decay is None and self.decay_fraction is None:
            raise ValueError("schedule=wsd needs schedule.decay or schedule.decay_fraction, e.g. decay_fraction=0.2")

    @property
    def warmup(self) -> int:
        return self.warmup_steps if self.unit == "steps" else self.warmup_tokens


class LearningRate:
    """lr(step, tokens): the rate of the update that completes step `step` (1-based) and makes `tokens` consumed tokens."""

    def __init__(self, config: ScheduleConfig, *, peak: float, total_steps: int, total_tokens: int) -> None:
        """Raises ValueError when warm-up and decay do not fit into the total length, or min_lr is above the peak."""
        config.validate()
        if config.start_lr is not None and not 0 < config.start_lr <= peak:
            raise ValueError(f"schedule.start_lr={config.start_lr} must be above 0 and not above optim.lr={peak}")
        self.config, self.peak = config, peak if config.start_lr is None else config.start_lr
        self.total = total_steps if config.unit == "steps" else total_tokens
        if config.min_lr > self.peak:
            key = "optim.lr" if config.start_lr is None else "schedule.start_lr"
            raise ValueError(f"schedule.min_lr={config.min_lr} is above {key}={self.peak}")
        decay = config.decay
        if decay is None:
            decay = round((config.decay_fraction or 0.0) * self.total)
        self.decay_start = config.warmup if config.name == "cosine" else self.total - decay
        if config.name != "constant" and not config.warmup <= self.decay_start <= self.total:
            raise ValueError(
                f"schedule.warmup_{config.unit}={config.warmup} and a decay of {decay} {config.unit} do not fit into the "
                f"{self.total} {config.unit} of the run (train.max_steps or train.max_tokens); shorten one of them, or train longer"
            )

    def __call__(self, step: int, tokens: int) -> float:
        done = step if self.config.unit == "steps" else tokens
        low, peak = self.config.min_lr, self.peak
        if done < self.config.warmup:
            return peak * done / self.config.warmup
        if self.config.name == "constant" or done <= self.decay_start:
            return peak
        r = min(1.0, (done - self.decay_start) / (self.total - self.decay_start))
        shape = "cosine" if self.config.name == "cosine" else self.config.decay_shape
        if shape == "quarter_cosine":
            return max(low, peak * math.cos(0.5 * math.pi * r))
        return low + DECAY_SHAPES[shape](r) * (peak - low)


@dataclass
class RampStage:
    """From the first step that starts at or after `from_samples` on, a step takes `global_batch_size` samples."""

    from_samples: int = 0
    global_batch_size: int = 0


@dataclass
class BatchSize:
    """The global batch size over a run: constant, or in stages (Nemotron-4: 384 -> 768 -> 1152)."""

    first: int
    ramp: list[RampStage] = field(default_factory=list)

    def __post_init__(self) -> None:
        starts = [0, *(stage.from_samples for stage in self.ramp)]
        if starts != sorted(set(starts)):
            raise ValueError(f"train.batch_ramp: from_samples must be above 0 and grow, got {starts[1:]}")
        for key, size in [
            ("train.global_batch_size", self.first),
            *(("train.batch_ramp: global_batch_size", stage.global_batch_size) for stage in self.ramp),
        ]:
            if size < 1:
                raise ValueError(f"{key}={size} must be at least 1")
        self._starts, self._sizes = starts, [self.first, *(stage.global_batch_size for stage in self.ramp)]

    def at(self, consumed: int) -> int:
        """Samples of the step that starts at sample `consumed`."""
        return self._sizes[bisect.bisect_right(self._starts, consumed) - 1]

    def before(self, end: int) -> int:
        """Samples of the step that ended at sample `end`."""
        return next((size for size in self._sizes if self.at(end - size) == size), self.at(end))

    def samples(self, steps: int, *, start: int = 0) -> int:
        """Samples consumed, those before `start` included, after `steps` more steps from sample `start` on."""
        return self._walk(start, steps=steps, samples=None)[1]

    def steps(self, samples: int, *, start: int = 0) -> int:
        """Steps needed from sample `start` on until at least `samples` samples are consumed."""
        return self._walk(start, steps=None, samples=samples)[0]

    def _walk(self, start: int, *, steps: int | None, samples: int | None) -> tuple[int, int]:
        """Go stage by stage (never step by step) from sample `start` until `steps` steps are done or `samples` samples consumed."""
        step, consumed = 0, start
        for index, size in enumerate(self._sizes):
            left = math.inf if index + 1 == len(self._sizes) else -(-(self._starts[index + 1] - consumed) // size)
            if steps is not None:
                left = min(left, steps - step)
            if samples is not None:
                left = min(left, -(-(samples - consumed) // size))
            count = max(0, int(left))
            step, consumed = step + count, consumed + count * size
        return step, consumed


@dataclass
class Progress:
    """How far a run is: the steps that are done, and the samples and tokens that they consumed."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0


@dataclass(frozen=True)
class Projection:
    """The remaining steps: from `start` on, with the current batch sizes and sequence length.

    What was consumed before `start` is taken as it is, whatever the sizes were then. Positions behind `start` give `start`.
    """

    start: Progress
    batch: BatchSize
    seq_len: int

    def at_step(self, step: int) -> Progress:
        """The position of the run after `step` steps in total."""
        more = max(0, step - self.start.step)
        samples = self.batch.samples(more, start=self.start.consumed_samples)
        tokens = self.start.consumed_tokens + (samples - self.start.consumed_samples) * self.seq_len
        return Progress(self.start.step + more, samples, tokens)

    def at_tokens(self, tokens: int) -> Progress:
        """The position of the run after the first step with which at least `tokens` tokens are consumed."""
        more = max(0, -(-(tokens - self.start.consumed_tokens) // self.seq_len))  # samples
        steps = self.batch.steps(self.start.consumed_samples + more, start=self.start.consumed_samples)
        return self.at_step(self.start.step + steps)


@dataclass(frozen=True)
class Schedule:
    """The rest of a run: batch sizes, learning rates and the end, as pure functions of progress."""

    projection: Projection
    lr: LearningRate
    end: Progress

    @property
    def total_steps(self) -> int:
        return self.end.step

    def rate(self, at: Progress) -> float:
        """Learning rate of the update that completes the step `at`."""
        return self.lr(at.step, at.consumed_tokens)

    def end_of_job(self, stop_at: int | None) -> Progress:
        """Where a job ends that stops when `stop_at` steps are done in all, or at the end of the run."""
        return self.end if stop_at is None else self.projection.at_step(min(self.end.step, stop_at))
