"""One typed tree for a run, read by Hydra from `configs/` and command-line overrides, checked before anything is built.

Notable features:
- Every section is the `*Config` dataclass that stands beside its class; this file only puts them together, so a wrong key or
  type is found by Hydra and a wrong value by the section's own `validate`.
- `validate(run, world_size)` holds the checks that need more than one section.
- This file and the doors are the only ones that know Hydra.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_lite import config_errors
from megatron_lite.checkpoint.ranks import CheckpointError, error_text
from megatron_lite.checkpoint.store import CheckpointConfig
from megatron_lite.config_errors import ConfigError
from megatron_lite.config_overrides import spelled_out
from megatron_lite.data.config import DataConfig
from megatron_lite.data.loader import rank_samples
from megatron_lite.engine.deepspeed import DeepSpeedConfig
from megatron_lite.engine.fsdp import FsdpConfig
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.huggingface import family_named
from megatron_lite.models.sampling import SamplingConfig
from megatron_lite.objectives.registry import ObjectiveConfig
from megatron_lite.optim.optimizer import OptimConfig
from megatron_lite.optim.schedule import ScheduleConfig
from megatron_lite.parallel.mesh import ParallelConfig
from megatron_lite.parallel.plans import check_divisible
from megatron_lite.precision.dtypes import PrecisionConfig
from megatron_lite.tracking.base import TrackingConfig
from megatron_lite.tracking.profile import ProfileConfig
from megatron_lite.trainer import TrainConfig, TrainingFailedError
from megatron_lite.watchdog import WatchdogConfig


@dataclass
class RunSection:
    """Name and directory of a run; the directory holds all that the run leaves behind."""

    name: str = "default"
    dir: str = "runs/${run.name}"

    def validate(self) -> None:
        """Raise ValueError when there is no directory to be named."""
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
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: Any = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    init_from: InitFromSection = field(default_factory=InitFromSection)
    resume: str = "auto"
    resume_allow: list[str] = field(default_factory=list)

    @property
    def takes_model_of_source(self) -> bool:
        """Whether `init_from` decides what the model is: `build.choose_model` then puts it here."""
        return self.init_from.path is not None and self.init_from.model == "source"


@dataclass
class EvaluateConfig:
    """`mlite evaluate`: the model comes from `checkpoint`, the data from here."""

    checkpoint: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    micro_batch_size: int = 8
    json: bool = False

    def validate(self) -> None:
        """Raise ValueError naming the key whose value cannot be."""
        if self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={self.micro_batch_size} must be at least 1")
        self.data.validate()
        self.precision.validate()


@dataclass
class GenerateConfig:
    """`mlite generate`: one `prompt`, or a `prompt_file` with one a line."""

    checkpoint: str = "???"
    prompt: str | None = None
    prompt_file: str | None = None
    max_new_tokens: int = 64
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass
class ConvertConfig:
    """`mlite convert`: from `source` (a run, a checkpoint or a Hugging Face folder) to the folder `target`."""

    source: str = "???"
    target: str = "???"
    to: str = "hf"
    dtype: str = "source"
    max_shard_gb: float = 5.0


def config_dir() -> Path:
    """The folder of the YAML files: `configs/` of the checkout, or the copy inside an installed wheel."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def compose_config(door: str, overrides: list[str]) -> Any:
    """The typed config object of `door` (train, evaluate, ...) with `overrides` applied; ConfigError tells what is wrong."""
    _register_schemas()
    overrides = spelled_out(overrides)
    with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
        try:
            config = OmegaConf.to_object(compose(door, overrides=overrides))
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(config_errors.explain(error, overrides, lambda: _keys_of(door, overrides))) from None
    wrong = config_errors.check_values(config)
    if wrong:
        raise ConfigError(wrong)
    return config


def to_yaml(config: Any) -> str:
    """A typed config as YAML text (what `config.yaml` of a run holds)."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Any) -> dict[str, Any]:
    """A typed config as plain dicts, lists and values (what a checkpoint's manifest holds)."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)  # type: ignore[return-value]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in flatten(value, f"{prefix}.{key}".lstrip(".")).items()}


def from_dict(schema: type, values: dict[str, Any]) -> Any:
    """The inverse of `to_dict` for one section: a typed object, unknown keys refused."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{schema.__name__}: {error}".split("\n")[0]) from None


def validate(run: RunConfig, world_size: int) -> None:
    """Every check of the config that needs no file: each section's own, and those across sections.

    Raises ValueError naming key, value and the way out.
    """
    for section in (
        run.data, run.train, run.optim, run.schedule, run.precision, run.engine, run.checkpoint, run.tracking,
        run.objective, run.profile, run.watchdog, run.run,
    ):  # fmt: skip
        section.validate()
    _validate_layout(run, world_size)
    _validate_start(run)
    if not run.takes_model_of_source:  # else the model is not known yet
        validate_model(run)


def _validate_layout(run: RunConfig, world_size: int) -> None:
    run.parallel.validate(world_size=world_size)
    dp_replicate, dp_shard, _ = run.parallel.degrees(world_size)
    if run.engine.kind == "deepspeed" and dp_replicate > 1:
        raise ValueError(
            f"parallel.dp_replicate={dp_replicate} with engine=deepspeed: ZeRO shards over all data-parallel ranks; set "
            "parallel.dp_replicate=1, or engine=fsdp"
        )
    if world_size == 1 and run.engine.kind == "fsdp" and run.engine.cpu_offload:
        raise ValueError(
            "engine.cpu_offload=true needs two processes or more; drop it, or use engine=deepspeed "
            "engine.offload_optimizer=true"
        )
    if not run.train.batch_ramp:  # with a ramp the ranks may grow from job to job: see build.check_batch_sizes
        size, micro_batch = run.train.global_batch_size, run.train.micro_batch_size
        rank_samples(0, batch=size, micro_batch=micro_batch, rank=0, ranks=dp_replicate * dp_shard)


def _validate_start(run: RunConfig) -> None:
    if run.seed < 0:
        raise ValueError(f"seed={run.seed} must be 0 or more")
    if not run.resume:
        raise ValueError("resume is empty; give auto, never, or the path of a checkpoint")
    if run.init_from.path is not None and not run.init_from.path.strip():
        raise ValueError(
            "init_from is empty; give a run, a checkpoint or a Hugging Face folder, or drop it to start afresh"
        )
    if run.init_from.optimizer and run.init_from.path is None:
        raise ValueError("init_from.optimizer=true says nothing without init_from=<path>; name it, or drop this")
    if run.init_from.model not in ("source", "config"):
        raise ValueError(f"init_from.model={run.init_from.model} is unknown; choose source or config")
    keys = flatten(to_dict(run))
    for name in run.resume_allow:
        if not any(key == name or key.startswith(f"{name}.") for key in keys):
            raise ValueError(f"resume_allow names {name!r}: {config_errors.unknown_key(name, keys)}")


def validate_model(run: RunConfig) -> None:
    """The part of `validate` that needs the model; raises ValueError."""
    run.model.validate()
    family_named(run.model.family)
    check_divisible(run.model, tp=run.parallel.tp, sequence_parallel=run.parallel.sequence_parallel)
    if run.parallel.sequence_parallel and run.data.seq_len % run.parallel.tp:
        raise ValueError(
            f"data.seq_len={run.data.seq_len} does not divide by parallel.tp={run.parallel.tp}, which "
            f"parallel.sequence_parallel needs; data.seq_len={run.data.seq_len // run.parallel.tp * run.parallel.tp} "
            "would, or switch sequence_parallel off"
        )
    if run.data.seq_len > run.model.max_seq_len:
        raise ValueError(
            f"data.seq_len={run.data.seq_len} is longer than model.max_seq_len={run.model.max_seq_len}; shorten the "
            "first or raise the second"
        )


def _register_schemas() -> None:
    store = ConfigStore.instance()
    store.store("train_schema", RunConfig)
    store.store("evaluate_schema", EvaluateConfig)
    store.store("generate_schema", GenerateConfig)
    store.store("convert_schema", ConvertConfig)
    store.store("fsdp_schema", FsdpConfig, group="engine")
    store.store("deepspeed_schema", DeepSpeedConfig, group="engine")


def _keys_of(door: str, overrides: list[str]) -> Iterator[str]:
    """Every dotted key of a door with its groups chosen, e.g. `train.max_steps`; Hydra must be initialised."""
    choices = [o for o in overrides if "." not in config_errors.key_of(o) or o.startswith("hydra.")]
    try:
        tree = compose(door, overrides=choices)
    except (HydraException, OmegaConfBaseException):
        tree = compose(door)
    waiting: list[tuple[str, Any]] = [("", OmegaConf.to_container(tree, resolve=False))]
    for prefix, tree in waiting:
        for name, value in tree.items():
            yield prefix + name
            if isinstance(value, dict):
                waiting.append((f"{prefix}{name}.", value))


def help_text(door: str, purpose: str) -> str:
    """What `--help` prints: purpose, the door's groups with their choices, every key with its default."""
    defaults = OmegaConf.load(config_dir() / f"{door}.yaml").defaults
    groups = sorted(config_dir() / name for entry in defaults if not isinstance(entry, str) for name in entry)
    choices = "[group=choice ...] " if groups else ""
    lines = [
        f"{purpose}\n",
        f"usage: python -m megatron_lite.{door} {choices}[key=value ...]\n",
        *["groups:"] * bool(groups),
    ]
    lines += [f"  {g.name}={'|'.join(sorted(f.stem for f in g.glob('*.yaml')))}" for g in groups]
    lines += [*[""] * bool(groups), "keys and their values (as composed without overrides):", ""]
    with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
        _register_schemas()
        lines.append(OmegaConf.to_yaml(compose(door)))
    return "\n".join(lines)


def run_door(door: str, purpose: str, main: Any) -> None:
    """Parse the command line, call `main(config)`, and turn an error that is the user's into one clear line and exit 2.

    A training that began and failed exits with 1: its run directory says why, and the same command goes on from there.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        try:
            print(help_text(door, purpose), flush=True)
        except BrokenPipeError:  # `--help | head` has read what it wanted; Python would flush once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    try:
        sys.exit(main(compose_config(door, arguments)) or 0)
    except TrainingFailedError as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)
    except (ValueError, CheckpointError, OSError) as error:
        print(f"error: {error_text(error)}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not config_errors.is_out_of_memory(error):
            raise
        print(f"failed: {config_errors.out_of_memory(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell says it: ended by SIGINT
