"""Is this file, is this checkpoint, what its manifest says? Answers are texts, None when it is sound."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.manifest import MANIFEST, read_manifest, step_of
from megatron_lite.checkpoint.ranks import CheckpointError


def file_problem(file: Path, entry: dict[str, Any], *, hashed: bool = True) -> str | None:
    """What is wrong with one file: missing, another size, another SHA-256 (read whole when `hashed`)."""
    try:
        size = file.stat().st_size
        if size != entry["size"]:
            return f"{file} has {size} bytes, not {entry['size']}"
        if hashed:
            with open(file, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != entry["sha256"]:
                return f"{file} is damaged: its SHA-256 is not the manifest's"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror or error}"
    return None


def directory_problem(path: Path, manifest: dict[str, Any]) -> str | None:
    """Is the directory's name the manifest's step, and does it hold no file that the manifest does not know?

    Hidden files are what file managers and network file systems leave behind; they are never opened.
    """
    step = step_of(path.name)
    if step is not None and step != manifest["step"]:
        return f"{path} holds step {manifest['step']}, not what its name says"
    try:
        names = {name for name in os.listdir(path) if not name.startswith(".")}
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    unknown = sorted(names - set(manifest["files"]) - {MANIFEST})
    if unknown:
        return f"{path} holds files that its manifest does not know: {', '.join(unknown[:5])}; move them away"
    return None


def checkpoint_problem(path: Path, *, hashed: bool = True) -> str | None:
    """What is wrong with a checkpoint, by one process; `hashed=False` looks at names and sizes only."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return str(error)
    problems = [directory_problem(path, manifest)]
    problems += [file_problem(path / name, entry, hashed=hashed) for name, entry in manifest["files"].items()]
    return next((problem for problem in problems if problem), None)


def fsync_directory(path: Path) -> None:
    """Make the directory's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
