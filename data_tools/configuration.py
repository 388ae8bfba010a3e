"""From `configs/` and the command line to the typed object of a door of `data_tools`.

The same as `megatron_lite.config` does for training, without importing torch: a worker of a data step is started in a second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_lite import config_errors


class ConfigError(ValueError):
    """A configuration that cannot be: the message names the key and the way out."""


def run_door(door: str, schema: type, purpose: str, action: Callable[[Any], object], arguments: list[str]) -> int:
    """Compose the configuration, call `action` with it, and turn a refusal into one clear line; the exit status."""
    if {"-h", "--help"} & set(arguments):
        print(_help_text(door, schema, purpose))
        return 0
    try:
        action(compose(door, schema, arguments))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the unfinished tasks", file=sys.stderr)
        return 130
    return 0


def config_dir() -> Path:
    """The folder of the YAML files: `configs/` of the checkout, or the copy inside an installed wheel."""
    import megatron_lite

    packages = [Path(place) for place in megatron_lite.__path__]
    for folder in [package / "configs" for package in packages] + [package.parent / "configs" for package in packages]:
        if folder.is_dir():
            return folder
    raise ConfigError(f"no folder configs/ beside or inside {packages}")


def compose(door: str, schema: type, arguments: list[str]) -> Any:
    """`configs/<door>.yaml` with the overrides in `arguments`, as an object of `schema`.

    Raises:
        ConfigError: an unknown key, a wrong type, a missing value or an unknown group.
    """
    ConfigStore.instance().store(f"{door}_schema", schema)
    overrides = list(_overrides(arguments))
    try:
        with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
            config = OmegaConf.to_object(hydra_compose(door, overrides=overrides))
    except (HydraException, OmegaConfBaseException) as error:
        tree = OmegaConf.to_container(OmegaConf.structured(schema), resolve=False)
        raise ConfigError(config_errors.explain(error, overrides, lambda: _keys(tree))) from None
    if wrong := config_errors.check_values(config):
        raise ConfigError(wrong)
    return config


def _overrides(arguments: list[str]) -> Iterator[str]:
    """The arguments with `--config-dir DIR` (a folder with groups of one's own) written as Hydra's search path."""
    waiting = iter(arguments)
    for argument in waiting:
        if argument.split("=")[0] == "--config-dir":
            folder = argument.partition("=")[2] or next(waiting, "")
            if not folder or not Path(folder).is_dir():
                raise ConfigError(f"--config-dir {folder or '(nothing)'} is no folder")
            yield f"hydra.searchpath=[file://{Path(folder).resolve()}]"
        elif argument.startswith("-"):
            raise ConfigError(f"{argument} is unknown; overrides are written key=value, see --help")
        else:
            yield argument


def _keys(tree: Any, prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")


def _help_text(door: str, schema: type, purpose: str) -> str:
    """Purpose, recipes, every key with its default."""
    folder = config_dir()
    lines = [
        f"{purpose.strip()}\n",
        f"usage: python -m data_tools.{door} [--config-dir DIR] [group=choice ...] [key=value ...]\n",
    ]
    for group in ("data_recipe", "executor") if door == "prepare" else ("data",):
        names = sorted(path.stem for path in (folder / group).glob("*.yaml"))
        lines.append(f"  {group}={'|'.join(names)}")
    lines += ["", OmegaConf.to_yaml(OmegaConf.structured(schema))]
    return "\n".join(lines)
