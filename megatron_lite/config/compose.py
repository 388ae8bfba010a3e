"""`configs/<name>.yaml` and command-line overrides, composed by Hydra into an object of a dataclass.

Notable features:
- the schema is an argument: this package knows no command and imports no torch, so a worker of a data step starts in a second;
- a wrong key, type or group is answered in one line, with the nearest valid one (`errors.explain`).
"""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_lite.config import errors
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.overrides import own_config_dir, spelled_out


def config_dir() -> Path:
    """The folder of the YAML files: `configs/` of the checkout, or the copy inside an installed wheel."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def register_schema(name: str, schema: Any, *, group: str | None = None) -> None:
    """Let the YAML files of `group` name `schema` in their defaults, as `<name>_schema`."""
    store = ConfigStore.instance()
    known = None if group else store.repo.get(f"{name}_schema.yaml")
    # a class need not be read again for every command line
    if known is None or OmegaConf.get_type(known.node) is not schema:
        store.store(f"{name}_schema", schema, group=group)


def register_choice(name: str, values: Any, *, group: str) -> None:
    """Let `group=name` choose `values` (a dict, or an object of a config class), which come from elsewhere than a YAML file."""
    ConfigStore.instance().store(name, values, group=group)


def compose_config(name: str, schema: Any, overrides: list[str]) -> Any:
    """`configs/<name>.yaml` with `overrides`, as an object of `schema`: a dataclass, or an object of one that has other defaults.

    Raises ConfigError for an unknown key or group, a wrong type, or a missing value.
    """
    register_schema(name, schema)
    folder = own_config_dir(overrides)
    OmegaConf.register_new_resolver("config_dir", lambda: _require_config_dir(folder), replace=True)
    overrides = spelled_out(overrides)
    with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
        try:
            config = OmegaConf.to_object(compose(name, overrides=overrides))
        except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
            keys = partial(_keys_of, name, schema, overrides)
            raise ConfigError(errors.explain(error, overrides, keys, own_folder=folder)) from None
    wrong = errors.check_values(config)
    if wrong:
        raise ConfigError(wrong)
    return config


def _require_config_dir(folder: Path | None) -> str:
    """What `${config_dir:}` in a YAML file means: paths in a blend that can be moved with its folder."""
    if folder is None:
        raise ConfigError("${config_dir:} is the folder given as --config-dir; give one, or write the path itself")
    return str(folder)


def to_yaml(config: Any) -> str:
    """A typed config as YAML text (what `config.yaml` of a run holds)."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def to_dict(config: Any) -> dict[str, Any]:
    """A typed config as plain dicts, lists and values (what a checkpoint's manifest holds)."""
    return asdict(config)


def from_dict(schema: type, values: dict[str, Any]) -> Any:
    """The inverse of `to_dict` for one section. Raises ConfigError for unknown keys."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{schema.__name__}: {error}".split("\n")[0]) from None


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in flatten(value, f"{prefix}.{key}".lstrip(".")).items()}


def help_text(name: str, schema: type, purpose: str) -> str:
    """What `mlite <name> --help` prints: the purpose, the groups with their choices, every key with its default."""
    defaults: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / f"{name}.yaml").defaults)
    groups = {group: choice for entry in defaults if not isinstance(entry, str) for group, choice in entry.items()}
    choices = "[group=choice ...] " if groups else ""
    lines = [f"{purpose.strip()}\n", f"usage: mlite {name} [--config-dir DIR] {choices}[key=value ...]\n"]
    if groups:
        lines.append("groups:")
    for group in sorted(groups):
        files = {path.stem for path in (config_dir() / group).glob("*.yaml")}
        chosen = {groups[group]} - {None, "???"}  # it may be a choice that no file has: see `register_choice`
        lines.append(f"  {group}={'|'.join(sorted(files | chosen))}")
    if groups:
        lines.append("")
    lines += ["keys and their values (as composed without overrides):", ""]
    register_schema(name, schema)
    with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
        lines.append(OmegaConf.to_yaml(_tree(name, schema, [])))
    return "\n".join(lines)


def _tree(name: str, schema: Any, overrides: list[str]) -> Any:
    """`configs/<name>.yaml` as Hydra composes it; the defaults of `schema` where a group has to be chosen first."""
    try:
        return compose(name, overrides=overrides)
    except (HydraException, OmegaConfBaseException):
        return OmegaConf.structured(schema) if not overrides else _tree(name, schema, [])


def _keys_of(name: str, schema: Any, overrides: list[str]) -> dict[str, bool]:
    """See `errors.KnownKeys`: of a config with its groups chosen; Hydra must be initialized."""
    choices = [o for o in overrides if "." not in errors.key_of(o) or o.startswith("hydra.")]
    tree = _tree(name, schema, choices)
    known: dict[str, bool] = {}
    waiting: list[tuple[str, Any]] = [("", OmegaConf.to_container(tree, resolve=False))]
    for prefix, values in waiting:
        section = OmegaConf.get_type(OmegaConf.select(tree, prefix.removesuffix(".")) if prefix else tree)
        for key, value in values.items():
            known[f"{prefix}{key}"] = False
            if isinstance(value, dict):
                own = OmegaConf.get_type(OmegaConf.select(tree, f"{prefix}{key}"))
                known[f"{prefix}{key}"] = not is_dataclass(own) and _takes_names(section, key)
                waiting.append((f"{prefix}{key}.", value))
    return known


def _takes_names(section: Any, key: str) -> bool:
    """Whether the mapping `key` of a section has plain values: Hydra adds no dataclass to one of dataclasses, such as a blend's groups."""
    if not is_dataclass(section):
        return True  # a mapping in a mapping
    kind = get_type_hints(section)[key]
    return get_origin(kind) is dict and not is_dataclass(get_args(kind)[1])
