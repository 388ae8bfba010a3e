"""The text of `mlite <command> --help`, kept in `~/.cache/megatron_lite` from the first time on.

It is composed from the config classes, which stand beside what they configure and so import torch: two seconds, for a text that changes
only with the sources. It is used while every source has the size and time that it had when the text was made, the rule by which Python uses
compiled modules. Where the folder cannot be written, nothing is kept.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

_PACKAGE = Path(__file__).parent


def kept_help(command: str) -> str | None:
    """The text that `keep_help` kept; None if there is none or the sources have changed since."""
    with suppress(OSError, RuntimeError, UnicodeDecodeError):
        made_from, _, text = _file(command).read_text(encoding="utf-8").partition("\n")
        if made_from == _fingerprint():
            return text
    return None


def keep_help(command: str, text: str) -> None:
    """Keep `text`, the current one, for the next time. A folder that cannot be written is no error."""
    with suppress(OSError, RuntimeError):
        file = _file(command)
        unfinished = file.with_suffix(f".{os.getpid()}")
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(f"{_fingerprint()}\n{text}", encoding="utf-8")
        unfinished.replace(file)


def _file(command: str) -> Path:
    """Raises RuntimeError where there is no home."""
    return Path.home() / ".cache" / "megatron_lite" / f"help-{command}.txt"


def _fingerprint() -> str:
    """A digest of path, size and time of every Python and YAML file that a help text can come from."""
    configs = _PACKAGE / "configs"  # of a wheel; in a checkout they are beside the package
    folders = [_PACKAGE, _PACKAGE.parent / "data_tools", *([] if configs.is_dir() else [_PACKAGE.parent / "configs"])]
    digest = hashlib.sha256()
    for file in sorted(file for folder in folders for ending in ("py", "yaml") for file in folder.rglob(f"*.{ending}")):
        stat = file.stat()
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
