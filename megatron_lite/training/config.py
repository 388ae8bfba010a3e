"""One typed tree for a run, read by Hydra from `configs/` and command-line overrides, checked before anything is built.

Notable features:
- Every section is the `*Config` dataclass in the module of its class; this file only puts them together, so a wrong key or
  type is found by Hydra and a wrong value by the section's own `validate`.
- `validate(run, world_size)` holds the checks that need more than one section.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from megatron_lite.checkpoint.store import CheckpointConfig
from megatron_lite.config import errors
from megatron_lite.config.compose import compose_config, flatten, register_choice, register_schema, to_dict
from megatron_lite.data.config import DataConfig
from megatron_lite.data.loader import rank_samples
from megatron_lite.engine.deepspeed import DeepSpeedConfig
from megatron_lite.engine.fsdp import FsdpConfig
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.huggingface import family_named
from megatron_lite.objectives.distillation import DistillationConfig
from megatron_lite.objectives.next_token import NextTokenConfig
from megatron_lite.optim.optimizer import OptimConfig
from megatron_lite.optim.schedule import ScheduleConfig
from megatron_lite.optim.spikes import SpikeConfig
from megatron_lite.parallel.mesh import ParallelConfig
from megatron_lite.parallel.quantization import check_gather, check_sizes
from megatron_lite.parallel.sequence_length import check_layout
from megatron_lite.precision.dtypes import PrecisionConfig
from megatron_lite.precision.recipes import RECIPES, Fp8Config, Nvfp4Config
from megatron_lite.tracking.base import TrackingConfig
from megatron_lite.tracking.profile import ProfileConfig
from megatron_lite.training.lineage import ONCE
from megatron_lite.training.support import refuse_unsupported
from megatron_lite.training.trainer import TrainConfig
from megatron_lite.training.watchdog import WatchdogConfig


@dataclass
class RunSection:
    """Name and directory of a run; the directory holds all that the run leaves behind."""

    name: str = "default"
    dir: str = "runs/${run.name}"

    def validate(self) -> None:
        """Raise ValueError if the name or the directory is empty."""
        for key in ("name", "dir"):
            if not getattr(self, key).strip():
                raise ValueError(f"run.{key} is empty; give it a name, e.g. run.dir=runs/first")


@dataclass
class InitFromSection:
    """Weights-only start (`init_from=<path>` sets `path`): step, schedule and data begin at 0.

    path: a run, a checkpoint or a Hugging Face folder. optimizer: keep Adam's moments and step counter too.
    model: `source` takes the model's config from there, `config` insists on that of this run; naming any model key on the
    command line means `config`.
    """

    path: str | None = None
    optimizer: bool = False
    model: str = "source"


@dataclass
class RunConfig:
    """Everything a training run is a function of."""

    run: RunSection = field(default_factory=RunSection)
    seed: int = 0
    model: ModelConfig = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: Any = None  # a `Precision`, chosen by its group
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: Any = None  # an `EngineConfig`, chosen by its group
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    objective: Any = None  # an `ObjectiveConfig`, chosen by its group
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    init_from: InitFromSection = field(default_factory=InitFromSection)
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    resume: str = "auto"
    resume_again: str = ONCE  # true or any new word: go back to `resume=<path>` once more
    resume_allow: list[str] = field(default_factory=list)

    @property
    def takes_model_of_source(self) -> bool:
        """Whether `init_from` decides what the model is: `build.choose_model` then puts it here."""
        return self.init_from.path is not None and self.init_from.model == "source"


def validate(run: RunConfig, world_size: int) -> None:
    """Every check of the config that needs no file: each section's own, and those across sections.

    Raises ValueError naming key, value and the way out.
    """
    for section in (
        run.data, run.train, run.optim, run.schedule, run.precision, run.engine, run.checkpoint, run.tracking,
        run.objective, run.profile, run.watchdog, run.spike, run.run,
    ):  # fmt: skip
        section.validate()
    _validate_layout(run, world_size)
    _validate_start(run)
    if not run.takes_model_of_source:  # else the model is not known yet
        validate_model(run, world_size)


def _validate_layout(run: RunConfig, world_size: int) -> None:
    run.parallel.validate(world_size=world_size)
    degrees = run.parallel.degrees(world_size)
    refuse_unsupported(
        "train", parallel=run.parallel, engine=run.engine, precision=run.precision, world_size=world_size
    )
    if not run.train.batch_ramp:  # with a ramp the ranks may grow from job to job: see build.check_batch_sizes
        size, micro_batch = run.train.global_batch_size, run.train.micro_batch_size
        rank_samples(0, batch=size, micro_batch=micro_batch, rank=0, ranks=degrees.data_parallel)


def _validate_start(run: RunConfig) -> None:
    if run.seed < 0:
        raise ValueError(f"seed={run.seed} must be 0 or more")
    if not run.resume:
        raise ValueError("resume is empty; give auto, never, or the path of a checkpoint")
    if run.resume_again.lower() != ONCE and run.resume in ("auto", "never"):
        raise ValueError(
            f"resume_again={run.resume_again.lower()} needs resume=<path>, the checkpoint to go back to once more; give it, or drop this"
        )
    if run.init_from.path is not None and not run.init_from.path.strip():
        raise ValueError(
            "init_from is empty; give a run, a checkpoint or a Hugging Face folder, or drop it to start afresh"
        )
    if run.init_from.optimizer and run.init_from.path is None:
        raise ValueError("init_from.optimizer=true needs init_from=<path>; give the path, or drop it")
    if run.init_from.model not in ("source", "config"):
        raise ValueError(f"init_from.model={run.init_from.model} is unknown; choose source or config")
    keys = flatten(to_dict(run))
    for name in run.resume_allow:
        if not any(key == name or key.startswith(f"{name}.") for key in keys):
            raise ValueError(f"resume_allow names {name!r}: {errors.unknown_key(name, keys)}")


def validate_model(run: RunConfig, world_size: int) -> None:
    """The part of `validate` that needs the model; raises ValueError."""
    run.model.validate()
    family_named(run.model.family)
    check_layout(run.model, run.parallel, seq_len=run.data.seq_len)
    if isinstance(run.precision, Fp8Config):
        tokens = run.train.micro_batch_size * (run.model.meta_tokens + run.data.seq_len // run.parallel.cp)
        check_sizes(run.model, run.precision, tp=run.parallel.tp, tokens=tokens)
        degrees = run.parallel.degrees(world_size)
        sharding = 1 if run.engine.replicates else degrees.dp_shard * degrees.cp
        check_gather(run.model, run.precision, tp=degrees.tp, ranks=sharding)
    if run.data.seq_len > run.model.max_seq_len:
        raise ValueError(
            f"data.seq_len={run.data.seq_len} is longer than model.max_seq_len={run.model.max_seq_len}; shorten the "
            "first or raise the second"
        )


register_schema("fsdp", FsdpConfig, group="engine")
register_schema("deepspeed", DeepSpeedConfig, group="engine")
register_schema("plain", PrecisionConfig, group="precision")
for name, recipe in RECIPES.items():
    register_schema(name, recipe, group="precision")
register_choice("nvfp4", Nvfp4Config(), group="precision")
register_schema("next_token", NextTokenConfig, group="objective")
register_schema("distillation", DistillationConfig, group="objective")


def compose_run(overrides: list[str]) -> RunConfig:
    """The config of `mlite train` with `overrides`. Raises ConfigError for an unknown key or group, a wrong type, or a missing value."""
    return compose_config("train", RunConfig, overrides)
