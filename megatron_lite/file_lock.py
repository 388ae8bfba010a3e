"""A lock file that allows one process at a time to use a folder, held with flock while the process lives.

The kernel releases the lock when the process ends in any way, so a stale lock file never blocks. File systems without locks
(some network and FUSE ones) give a warning and no protection.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

logger = logging.getLogger(__name__)

_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class FileLock:
    """Exclusive use of what the config names by `key`=`value`; a context manager.

    path: the lock file, which contains the name of the holder.
    waiting: called with the holder's name before this process waits for its end; None: it is refused instead.
    `acquire` then raises ValueError naming key, value and the host and process that hold it.
    """

    def __init__(self, path: Path, *, key: str, value: object, waiting: Callable[[str], None] | None = None) -> None:
        self.path = path
        self._key, self._value, self._waiting = key, value, waiting
        self._file: IO[str] | None = None
        self._made: list[Path] = []
        # a forked worker shares the lock: unless it lets go, it would hold it after our death
        me = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close_in_child(me))

    def acquire(self) -> FileLock:
        """Take the lock or raise. Directories that are missing are made."""
        file = self._locked()
        while not _is_at(file, self.path):  # its holder removed it, see `release`
            file.close()
            file = self._locked()
        self._file = file
        with suppress(OSError):  # for the eyes of others only; on a full disk something else fails, and says so
            file.seek(0)
            file.truncate()
            json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
            file.flush()
        return self

    def _locked(self) -> IO[str]:
        """The file, opened and locked."""
        missing = [folder for folder in (self.path.parent, *self.path.parent.parents) if not folder.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._made = self._made or missing
        file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115  (stays open as long as the lock is held)
        try:
            self._flock(file)
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                file.close()
                raise
            logger.warning(
                "%s: this file system has no locks (%s); see to it that no second process uses %s=%s",
                self.path,
                error.strerror,
                self._key,
                self._value,
            )
        except ValueError:
            file.close()
            raise
        return file

    def _flock(self, file: IO[str]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            owner = _owner(file)
            if self._waiting is None:
                raise ValueError(
                    f"{self._key}={self._value} is in use by {owner}; wait for it, end it, or set another {self._key}"
                ) from error
            self._waiting(owner)
            fcntl.flock(file, fcntl.LOCK_EX)

    def release(self) -> None:
        """Release the lock. The file stays, unless the directory was created for it and nothing else was written there."""
        if self._file is None:
            return
        if self._made and os.listdir(self.path.parent) == [self.path.name]:
            with suppress(OSError):
                self.path.unlink()
                for folder in self._made:
                    folder.rmdir()
        with suppress(OSError):  # what a full disk did not take
            self._file.close()
        self._file = None

    def __enter__(self) -> FileLock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _close_in_child(reference: weakref.ref[FileLock]) -> None:
    lock = reference()
    if lock is not None and lock._file is not None:
        lock._file.close()
        lock._file = None


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _owner(file: IO[str]) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return f"process {holder['pid']} on host {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
