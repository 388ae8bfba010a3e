"""The command line's overrides as Hydra reads them: short forms written out, free text quoted."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_lite.config.errors import ConfigError

_FREE_TEXT = ("prompt", "prompt_file", "checkpoint", "source", "target", "resume", "run.dir", "init_from.path")


def own_config_dir(overrides: list[str]) -> Path | None:
    """The folder of `--config-dir DIR` or `--config-dir=DIR`, absolute; None if it is not given."""
    for position, override in enumerate(overrides):
        if override.startswith("--config-dir="):
            return Path(override.partition("=")[2]).resolve()
        if override == "--config-dir" and position + 1 < len(overrides):
            return Path(overrides[position + 1]).resolve()
    return None


def spelled_out(overrides: list[str]) -> list[str]:
    """The overrides with short forms written out.

    `init_from=x` -> `init_from.path=x`; text and paths need no quotes of their own (`prompt=def main(`); `--config-dir DIR` (a folder
    with groups of one's own, e.g. DIR/data/mine.yaml) -> Hydra's search path.
    """
    result: list[str] = []
    waiting = iter(overrides)
    for override in waiting:
        _check_text(override)
        if override == "--config-dir" or override.startswith("--config-dir="):
            folder = override.partition("=")[2] or next(waiting, "")
            if not folder or not Path(folder).is_dir():
                raise ConfigError(f"--config-dir {folder or '(nothing)'} is not a folder")
            result.append(f"hydra.searchpath=[file://{Path(folder).resolve()}]")
        elif override.startswith("-"):
            raise ConfigError(f"{override} is unknown; overrides are written key=value, see --help")
        else:
            result.append(
                _as_text(
                    override.replace("init_from=", "init_from.path=", 1)
                    if override.startswith("init_from=")
                    else override
                )
            )
    names_model = any(o.lstrip("+~").startswith(("model=", "model.")) for o in result)
    if names_model and any(o.startswith("init_from.path=") for o in result):
        result.insert(0, "init_from.model=config")
    return result


def _check_text(override: str) -> None:
    """Raises ConfigError for bytes of the command line that are not text: no file could hold them as UTF-8."""
    try:
        override.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{override!r} is not UTF-8 text; give the name, or rename the file, in UTF-8") from None


def _as_text(override: str) -> str:
    """The override with its value quoted for Hydra where it is free text, or a path that Hydra's grammar would stumble over."""
    key, _, value = override.partition("=")
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if key not in _FREE_TEXT or quoted or (value == "null" and key != "prompt"):
        return override
    # Inside quotes Hydra takes a backslash for itself only in front of a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), value)
    if key == "prompt":  # in a path ${...} is a variable, in a prompt it is text
        escaped = escaped.replace("${", r"\${")
    return f"{key}='{escaped}'"
