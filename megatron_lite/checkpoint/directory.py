"""The directory `checkpoints/`: which steps exist, which may be deleted, and how checkpoints are published and deleted
atomically.

Names: `step_XXXXXXXX` is a complete checkpoint. Everything that begins with `.tmp-` is being written or deleted:
    `.tmp-step_X` is being written, `.tmp-delete-step_X` being deleted, `.tmp-replaced-step_X` was replaced
    by a newer save of the same step, `.tmp-abandoned-step_X` is after the step a run went back to.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_lite.atomic import fsync
from megatron_lite.checkpoint.manifest import MANIFEST, read_manifest, step_name, step_of
from megatron_lite.errors import CheckpointError

logger = logging.getLogger(__name__)

_TEMPORARY = ".tmp-"
_REPLACED = ".tmp-replaced-"


def list_steps(directory: Path) -> list[int]:
    """The steps whose checkpoints are visible, ascending; none when there is no directory."""
    if not directory.is_dir():
        return []
    return sorted(step for entry in directory.iterdir() if (step := step_of(entry.name)) is not None)


def expendable(steps: Collection[int], *, last: int, keep: int, keep_every: int | None) -> list[int]:
    """The steps that retention does not keep, ascending.

    Kept are the `keep` newest up to `last`, the step saved last, and every multiple of `keep_every`. Steps
    after `last` belong to a history that a run went back behind; they count for nothing and are left alone.
    """
    history = sorted(step for step in steps if step <= last)
    return [step for step in history[:-keep] if not keep_every or step % keep_every]


def prune(directory: Path, *, last: int, keep: int, keep_every: int | None, damaged: Collection[int] = ()) -> list[int]:
    """Delete what `expendable` names, but never the newest sound checkpoint. Returns the deleted steps."""
    steps = list_steps(directory)
    going = expendable(steps, last=last, keep=keep, keep_every=keep_every)

    def sound(step: int) -> bool:
        path = directory / step_name(step)
        try:
            return step not in damaged and problem_without_hashing(path, read_manifest(path)) is None
        except CheckpointError:
            return False

    staying = [step for step in steps if step <= last and step not in going]
    if going and not any(sound(step) for step in reversed(staying)):
        spared = next((step for step in reversed(going) if sound(step)), None)
        going = [step for step in going if step != spared]
    for step in going:
        remove(directory, step)
    return going


def remove(directory: Path, step: int) -> None:
    """Delete a checkpoint: first rename it away atomically, then delete its files."""
    hidden = _move(directory, step_name(step), f".tmp-delete-{step_name(step)}")
    shutil.rmtree(hidden, ignore_errors=True)


def abandon_after(directory: Path, step: int) -> list[int]:
    """Hide the checkpoints after `step` durably; the next save that succeeds deletes them. Returns their steps.

    The newest goes first, so that a kill in between leaves the run as it was some steps earlier.
    """
    newer = [found for found in list_steps(directory) if found > step]
    if newer:
        clean(directory, keep_abandoned=True)  # else `recover` would put back what a hidden one had replaced
    for found in reversed(newer):
        _move(directory, step_name(found), f".tmp-abandoned-{step_name(found)}")
        fsync(directory)
    return newer


def publish(temporary: Path, final: Path) -> None:
    """Rename a complete checkpoint to its final name, replacing one of the same step, durably."""
    directory = final.parent
    replaced = None
    if final.exists():
        # a crash between the two renames leaves the old one under this name; `recover` puts it back
        replaced = _move(directory, final.name, _REPLACED + final.name)
    os.rename(temporary, final)
    fsync(directory)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def recover(directory: Path) -> None:
    """Restore a replaced checkpoint whose successor was never published."""
    if directory.is_dir():
        for entry in list(directory.glob(f"{_REPLACED}*")):
            final = directory / entry.name.removeprefix(_REPLACED)
            if not final.exists():
                os.rename(entry, final)


def clean(directory: Path, *, keep_abandoned: bool) -> None:
    """Delete what crashed saves and deletions left behind. What cannot be deleted is warned about."""
    recover(directory)
    for entry in list(directory.glob(f"{_TEMPORARY}*")):
        if keep_abandoned and entry.name.startswith(".tmp-abandoned-"):
            continue
        try:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        except OSError as error:
            logger.warning("%s is left over and cannot be deleted: %s", entry, error)


def _move(directory: Path, name: str, hidden: str) -> Path:
    target = directory / hidden
    if target.exists():
        shutil.rmtree(target)
    os.rename(directory / name, target)
    return target


def size_problem(file: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with one file apart from its values: it is missing or has another size."""
    try:
        size = file.stat().st_size
    except OSError as error:
        return unreadable(file, error)
    return None if size == entry["size"] else f"{file} has {size} bytes, not {entry['size']}"


def unreadable(file: Path, error: OSError) -> str:
    """What to say of a file that an error keeps from being read."""
    return f"{file} cannot be read: {error.strerror or error}"


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
        return unreadable(path, error)
    unknown = sorted(names - set(manifest["files"]) - {MANIFEST})
    if unknown:
        return f"{path} holds files that its manifest does not know: {', '.join(unknown[:5])}; move them away"
    return None


def problem_without_hashing(path: Path, manifest: dict[str, Any]) -> str | None:
    """What names and sizes alone say is wrong with a checkpoint."""
    problems = (size_problem(path / name, entry) for name, entry in manifest["files"].items())
    return directory_problem(path, manifest) or next(filter(None, problems), None)
