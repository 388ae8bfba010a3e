"""From `configs/` and the command line to the typed object of a door of `data_tools`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """A configuration that cannot be: the message names the key and the way out."""


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
    try:
        with initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
            return OmegaConf.to_object(hydra_compose(door, overrides=arguments))
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        cause = error.__cause__
        detail = f": {str(cause).splitlines()[0]}" if cause is not None and str(cause) else ""
        raise ConfigError(" ".join(line for line in lines if not line.startswith("object_type")) + detail) from None


def help_text(door: str, schema: type, purpose: str) -> str:
    """What `--help` prints: purpose, recipes, every key with its default."""
    folder = config_dir()
    lines = [purpose.strip(), "", f"usage: python -m data_tools.{door} [group=choice ...] [key=value ...]", ""]
    for group in ("data_recipe", "executor") if door == "prepare" else ("data",):
        names = sorted(path.stem for path in (folder / group).glob("*.yaml"))
        lines.append(f"  {group}={'|'.join(names)}")
    lines += ["", OmegaConf.to_yaml(OmegaConf.structured(schema))]
    return "\n".join(lines)
