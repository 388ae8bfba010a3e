"""One typed tree for a run, read by Hydra from `configs/` and command-line overrides, checked before anything is built.

Notable features:
- Every section is the `*Config` dataclass that stands beside its class; this file only puts them together, so a wrong key or
  type is found by Hydra and a wrong value by the section's own `validate`.
- `validate(run, world_size)` holds the checks that need more than one section.
- This file and the doors are the only ones that know Hydra.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_lite.checkpoint.ranks import CheckpointError
from megatron_lite.checkpoint.store import CheckpointConfig
from megatron_lite.data.config import DataConfig
from megatron_lite.engine.deepspeed import DeepSpeedConfig
from megatron_lite.engine.fsdp import FsdpConfig
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.huggingface import family_named
from megatron_lite.models.sampling import SamplingConfig
from megatron_lite.optim.optimizer import OptimConfig
from megatron_lite.optim.schedule import ScheduleConfig
from megatron_lite.parallel.mesh import ParallelConfig
from megatron_lite.parallel.plans import check_divisible
from megatron_lite.precision.dtypes import PrecisionConfig
from megatron_lite.tracking.base import TrackingConfig
from megatron_lite.tracking.profile import ProfileConfig
from megatron_lite.trainer import TrainConfig, TrainingDivergedError
from megatron_lite.watchdog import WatchdogConfig


class ConfigError(ValueError):
    """A configuration that cannot be: the message names the key, the value and the way out."""


@dataclass
class RunSection:
    """Name and directory of a run; the directory holds all that the run leaves behind."""

    name: str = "default"
    dir: str = "runs/${run.name}"


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
    overrides = _spelled_out(overrides)
    try:
        with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
            return OmegaConf.to_object(compose(door, overrides=overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from None


def _spelled_out(overrides: list[str]) -> list[str]:
    """The overrides with short forms written out.

    `init_from=x` -> `init_from.path=x`; `--config-dir DIR` (a folder with groups of one's own, e.g. DIR/data/mine.yaml) -> Hydra's
    search path.
    """
    result: list[str] = []
    waiting = iter(overrides)
    for override in waiting:
        if override == "--config-dir" or override.startswith("--config-dir="):
            folder = override.partition("=")[2] or next(waiting, "")
            if not Path(folder).is_dir():
                raise ConfigError(f"--config-dir {folder or '(nothing)'} is no folder")
            result.append(f"hydra.searchpath=[file://{Path(folder).resolve()}]")
        elif override.startswith("-"):
            raise ConfigError(f"{override} is unknown; overrides are written key=value, see --help")
        else:
            result.append(
                override.replace("init_from=", "init_from.path=", 1) if override.startswith("init_from=") else override
            )
    names_model = any(o.lstrip("+~").startswith(("model=", "model.")) for o in result)
    if names_model and any(o.startswith("init_from.path=") for o in result):
        result.insert(0, "init_from.model=config")
    return result


def to_yaml(config: Any) -> str:
    """A typed config as YAML text (what `config.yaml` of a run holds)."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Any) -> dict[str, Any]:
    """A typed config as plain dicts, lists and values (what a checkpoint's manifest holds)."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)  # type: ignore[return-value]


def from_dict(schema: type, values: dict[str, Any]) -> Any:
    """The inverse of `to_dict` for one section: a typed object, unknown keys refused."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{schema.__name__}: {error}".split("\n")[0]) from None


def validate(run: RunConfig, world_size: int) -> None:
    """Every check of the config that needs no file: each section's own, and those across sections.

    Raises ValueError naming key, value and the way out.
    """
    for section in (
        run.data, run.train, run.optim, run.schedule, run.precision, run.engine, run.checkpoint, run.tracking,
        run.profile, run.watchdog,
    ):  # fmt: skip
        section.validate()
    run.parallel.validate(world_size=world_size)
    if run.init_from.model not in ("source", "config"):
        raise ValueError(f"init_from.model={run.init_from.model} is unknown; choose source or config")
    if not run.takes_model_of_source:  # else the model is not known yet
        validate_model(run)


def validate_model(run: RunConfig) -> None:
    """The part of `validate` that needs the model; raises ValueError."""
    run.model.validate()
    family_named(run.model.family)
    check_divisible(run.model, tp=run.parallel.tp, sequence_parallel=run.parallel.sequence_parallel)
    if run.parallel.sequence_parallel and run.data.seq_len % run.parallel.tp:
        raise ValueError(
            f"data.seq_len={run.data.seq_len} does not divide by parallel.tp={run.parallel.tp}, which "
            "parallel.sequence_parallel needs; change one of them, or switch sequence_parallel off"
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


def known_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema, e.g. `train.max_steps`."""
    for item in fields(schema):
        yield prefix + item.name
        default = item.default_factory() if callable(item.default_factory) else None  # type: ignore[misc]
        if is_dataclass(default):
            yield from known_keys(type(default), f"{prefix}{item.name}.")


def _explain(error: Exception, overrides: list[str]) -> str:
    """Hydra's message in one line, the override that it is about, and the nearest key that exists."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = " ".join(line.strip() for line in str(error).splitlines() if not line.strip().startswith("object_type"))
    detail = str(cause).splitlines()[0]
    if detail not in text:
        text += f": {detail}"
    for override in overrides:
        key = override.lstrip("+~").split("=")[0]
        if key and (f"'{key}'" in text or f"'{key.split('.')[-1]}'" in text):
            near = difflib.get_close_matches(key, list(known_keys(RunConfig)), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near and key not in near else ""
            return f"{override}: {text}{hint}"
    return text


def help_text(door: str, purpose: str) -> str:
    """What `--help` prints: purpose, groups with their choices, every key with its default."""
    groups = sorted(p for p in config_dir().iterdir() if p.is_dir())
    lines = [
        f"{purpose}\n",
        f"usage: python -m megatron_lite.{door} [group=choice ...] [key=value ...]\n",
        "groups:",
    ]
    lines += [f"  {g.name}={'|'.join(sorted(f.stem for f in g.glob('*.yaml')))}" for g in groups]
    lines += ["", "keys and their values (as composed without overrides):", ""]
    with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
        _register_schemas()
        lines.append(OmegaConf.to_yaml(compose(door)))
    return "\n".join(lines)


def run_door(door: str, purpose: str, main: Any) -> None:
    """Parse the command line, call `main(config)`, and turn an error that is the user's into one clear line and exit 2."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(help_text(door, purpose))
        return
    try:
        sys.exit(main(compose_config(door, arguments)) or 0)
    except (ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except TrainingDivergedError as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)
