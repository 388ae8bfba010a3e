"""The project's error types, and one line of text for a person from any of them. Imports nothing of the project."""

from __future__ import annotations

import errno


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the file, the rank and the reason."""


class WorkFailedError(RuntimeError):
    """Work that began could not be finished; what was finished before is kept, and the same command continues from there."""


class TrainingFailedError(WorkFailedError):
    """A training that began could not continue; the run directory holds what was saved before."""


class TrainingDivergedError(TrainingFailedError):
    """Too many steps in a row without a finite loss and gradient."""


_WAYS_OUT = {
    errno.ENOSPC: "free some space, or name a directory on another disk",
    errno.EDQUOT: "free some space, or ask for a larger quota",
    errno.EROFS: "name a directory on a disk that can be written",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.ENOTDIR: "a part of this path is a file: name another place",
    errno.EEXIST: "something else is there: move it away, or name another place",
    errno.EISDIR: "it is a directory: name a file, or move it away",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
_CHECK = "check the path, or name another place"


def error_text(error: BaseException) -> str:
    """One line for the user: the message of a ValueError or CheckpointError; for an OSError the file, the reason and how to
    fix it."""
    if isinstance(error, CheckpointError | ValueError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        way_out = _WAYS_OUT.get(error.errno or 0, _CHECK if names else "")
        return ": ".join([" -> ".join(names) or "the disk", error.strerror]) + (f"; {way_out}" if way_out else "")
    return f"{type(error).__name__}: {error}"
