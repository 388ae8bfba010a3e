"""The text of `mlite <command> --help`, kept where Python keeps compiled modules and by the same rule.

It is composed from the config classes, which stand beside what they configure and so import torch: two seconds, for a text that changes
only with the sources. It is used while all of them have the sizes and times that they had when it was made. Where `__pycache__` cannot be
written, or is not wanted, nothing is kept.
"""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import suppress
from importlib.util import cache_from_source
from pathlib import Path

_PACKAGE = Path(__file__).parent


def kept_help(command: str) -> str | None:
    """The text that `keep_help` kept; None if there is none or the sources have changed since."""
    with suppress(OSError, UnicodeDecodeError):
        made_from, _, text = _file(command).read_text(encoding="utf-8").partition("\n")
        if made_from == _fingerprint():
            return text
    return None


def keep_help(command: str, text: str) -> None:
    """Keep `text`, the current one, for the next time. A folder that cannot be written is no error."""
    if sys.dont_write_bytecode:
        return
    file = _file(command)
    unfinished = file.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(f"{_fingerprint()}\n{text}", encoding="utf-8")
        unfinished.replace(file)


def show_help(text: str) -> None:
    """Print it, also to a reader that stops early."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `--help | head` has read what it wanted; Python would flush once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _file(command: str) -> Path:
    return Path(cache_from_source(__file__)).with_name(f"help-{command}.{sys.implementation.cache_tag}.txt")


def _fingerprint() -> str:
    """A digest of path, size and time of every Python and YAML file that a help text can come from."""
    configs = _PACKAGE / "configs"  # of a wheel; in a checkout they are beside the package
    folders = [_PACKAGE, _PACKAGE.parent / "data_tools", *([] if configs.is_dir() else [_PACKAGE.parent / "configs"])]
    digest = hashlib.sha256()
    for file in sorted(file for folder in folders for ending in ("py", "yaml") for file in folder.rglob(f"*.{ending}")):
        stat = file.stat()
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
