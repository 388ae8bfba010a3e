"""The text of `mlite <command> --help`, kept in `~/.cache/megatron_lite` from the first time on.

To compose it takes two seconds, because a config class is in the module that it configures, which imports torch. The
kept text is used as long as every source file has the same size and time as when the text was composed, which is also
how Python decides whether a compiled module is current. Nothing is kept if the folder cannot be written.
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
    """Keep `text` for the next time. Does nothing if the folder cannot be written."""
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
