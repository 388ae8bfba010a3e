"""Files that are either whole or not there, and a full disk that says so.

Notable features:
- `atomic_path` gives a temporary name in the same folder; the final name appears by one rename after an fsync
- an OSError of a full disk becomes a message that names the folder and says that finished tasks are kept
- `OutputLock` refuses a second run on one output (an advisory lock that the kernel drops when the holder dies)
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np


class OutputLock:
    """Holds `<folder>/.lock` while a run writes to `folder`; the lock dies with the process, however it ends."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._file: IO[str] | None = None

    def __enter__(self) -> OutputLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ValueError(
                f"data_recipe.output={self.path.parent} is being written by {holder}; wait for it, stop it, or give "
                "this run another data_recipe.output"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}")
        self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed to it when the block ends well, removed when it does not.

    Raises:
        ValueError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    except OSError as error:
        raise explain_os_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explain_os_error(error: OSError, path: Path) -> Exception:
    """`error` itself, or a ValueError with the way out when the disk or quota is full."""
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
