"""Atomic writes of files and folders, and clear errors for a full disk.

Notable features:
- `atomic_path` gives a temporary name in the same folder; the final name appears by one rename after an fsync
- an OSError of a full disk becomes a message that names the folder and says that finished tasks are kept
- `whole_folder` does the same for a folder
- parents that are missing are made; `check_place` says early whether that and the writing will work
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path next to `path`. If the block succeeds, it is synced to disk and renamed to `path`; otherwise it is
    removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with _errors_about(path, temporary):
            yield temporary
            fsync(temporary)
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder, which is made. `path` must be missing or an empty folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process of this number that was killed
    try:
        with _errors_about(path, temporary):
            temporary.mkdir()
            yield temporary
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_place(path: Path) -> None:
    """Raise the OSError with which `whole_file` or `whole_folder` would end there, before its content is computed. Leaves nothing."""
    missing = [parent for parent in path.parents if not parent.exists()]
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _errors_about(path, temporary):
            temporary.mkdir()
            temporary.rmdir()
    finally:
        for parent in missing:  # the innermost first
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def _errors_about(path: Path, temporary: Path) -> Iterator[None]:
    """An OSError about the temporary name is one about the name that the user gave."""
    try:
        yield
    except OSError as error:
        if error.filename == str(temporary):
            error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """`whole_file` for the data tools.

    Raises:
        ValueError: the disk is full.
    """
    try:
        with whole_file(path) as temporary:
            yield temporary
    except OSError as error:
        raise explain_os_error(error, path) from error


def fsync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explain_os_error(error: OSError, path: Path) -> Exception:
    """`error` itself, or a ValueError that says what to do if the disk or quota is full."""
    short = error.errno is None and "requested and" in str(error)  # numpy's own, when fewer bytes were taken
    if short or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ValueError(
            f"{path}: cannot write, {os.strerror(error.errno or errno.ENOSPC)}; nothing half-written was kept. Free space under "
            f"{path.parent} and start the same command again: finished tasks are not repeated"
        )
    return error


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON, atomically; keys stay in the order given."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_array(path: Path, array: np.ndarray) -> None:
    """One array as `.npy`, atomically."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
