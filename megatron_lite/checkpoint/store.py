"""The checkpoints of a run: saving in the foreground or behind, finding the newest valid one, loading.

How a checkpoint becomes whole is in `saving.py`. Loading divides the files to verify over the ranks and
decides once for all of them: all load the same step, or all fall back to the same older one.

Notable features
- A process group of its own (gloo), so that a background save never stands between two collectives of the
  training.
- At most one save in flight; its error surfaces at the next `save`, `wait`, `newest_valid` or `load`, with
  its step.
- One process is the same code with `group=None`.
"""

from __future__ import annotations

import copy
import logging
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lite.checkpoint import directory as folder
from megatron_lite.checkpoint import manifest as manifests
from megatron_lite.checkpoint.directory import directory_problem, file_problem
from megatron_lite.checkpoint.saving import Saver, Staging
from megatron_lite.checkpoint.storage import OpenStream, open_for_writing, read_pieces
from megatron_lite.errors import CheckpointError, error_text
from megatron_lite.parallel.global_view import Piece
from megatron_lite.ranks import Ranks

logger = logging.getLogger(__name__)

Tensors = Mapping[str, Piece | torch.Tensor]


@dataclass
class CheckpointConfig:
    """When checkpoints are written, how, and which stay."""

    every: int = 1000  # steps between checkpoints; 0: none but those the caller asks for
    keep: int = 3  # the newest that stay
    keep_every: int | None = None  # multiples of this step stay for good
    async_save: bool = False  # write in the background
    file_mib: int = 512  # aimed size of a file
    timeout_seconds: int = 1800  # how long a rank waits for the others, slow writes included

    def validate(self) -> None:
        """Raises ValueError naming the key."""
        for key, least in (("every", 0), ("keep", 1), ("file_mib", 1), ("timeout_seconds", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"checkpoint.{key}={getattr(self, key)} must be at least {least}")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError(
                f"checkpoint.keep_every={self.keep_every} must be at least 1, or null to keep none for good"
            )

    def due(self, step: int) -> bool:
        """Is a checkpoint to be written after `step`?"""
        return self.every > 0 and step % self.every == 0


class CheckpointStore:
    """The directory of a run's checkpoints. Collective: every rank makes one and calls the same methods."""

    def __init__(
        self,
        directory: str | Path,
        config: CheckpointConfig,
        *,
        group: dist.ProcessGroup | None = None,
        open_stream: OpenStream = open_for_writing,
    ) -> None:
        config.validate()
        self.directory = Path(directory)
        self.config = config
        self.ranks = Ranks(group, timeout_seconds=config.timeout_seconds)
        self._saver = Saver(self.directory, self.ranks, file_bytes=config.file_mib * 2**20, open_stream=open_stream)
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._verified: dict[Path, str] = {}
        self._damaged: set[int] = set()

    @classmethod
    def with_own_group(cls, directory: str | Path, config: CheckpointConfig) -> CheckpointStore:
        """A store over all ranks with a new gloo group, or without one in a single process."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls(directory, config)
        timeout = timedelta(seconds=config.timeout_seconds)
        return cls(directory, config, group=dist.new_group(backend="gloo", timeout=timeout))

    def check_shared(self) -> None:
        """Every rank must see one directory: rank 0 leaves a file there for a moment, the others look for it.

        Raises CheckpointError on every rank, naming those that do not see it.
        """
        if self.ranks.size == 1:
            return
        name, made = self.ranks.first("mark", lambda: _leave_mark(self.directory))
        mark = self.directory / name
        seen = self.ranks.agree("look for the mark", mark.exists)
        self.ranks.first("unmark", lambda: _take_mark(mark, made))
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        if blind:
            raise CheckpointError(
                f"ranks {blind} do not see {self.directory} as rank 0 does: run.dir must lie on a shared file system"
            )

    # ---- saving

    def save(self, step: int, tensors: Tensors, state: dict[str, Any]) -> None:
        """Write `tensors` and the JSON `state` (`manifest.STATE_KEYS` and more) as the checkpoint of `step`.

        tensors: global name -> `Piece`, or the whole tensor on a single process; the same names on every rank.
        With `async_save` this returns when the tensors are copied. Raises CheckpointError on every rank.
        """
        self.wait()
        pieces = as_pieces(tensors, ranks=self.ranks.size)
        state = copy.deepcopy(state)
        if not self.config.async_save:
            self._write(step, pieces, state)
            return
        pieces = self._staging.copy(pieces)
        # a daemon: when this process dies of an error elsewhere, it must not wait for ranks that never come
        self._thread = threading.Thread(
            target=self._write_in_background, args=(step, pieces, state), name=f"save-{step}", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until no save is in flight. Raises the error of the save that was."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write_in_background(self, step: int, pieces: dict[str, Piece], state: dict[str, Any]) -> None:
        try:
            self._write(step, pieces, state)
        except BaseException as error:  # raised in the caller's thread by wait()
            self._failure = error

    def _write(self, step: int, pieces: dict[str, Piece], state: dict[str, Any]) -> None:
        self._saver.write(step, pieces, state)
        self._damaged.discard(step)
        self._verified.clear()
        if self.ranks.rank == 0:
            self._tidy(step)

    def _tidy(self, step: int) -> None:
        """After a save that succeeded. What goes wrong here costs disk space, not the run."""
        try:
            folder.clean(self.directory, keep_abandoned=False)
            self._prune(step)
        except OSError as error:
            logger.warning("old checkpoints in %s could not be deleted: %s", self.directory, error)

    def prune(self) -> None:
        """Delete what retention lets go now. Rank 0 deletes."""
        self.wait()
        self.ranks.first("prune", lambda: self._prune(max(self.steps(), default=0)))

    def _prune(self, last: int) -> list[int]:
        keep, keep_every = self.config.keep, self.config.keep_every
        return folder.prune(self.directory, last=last, keep=keep, keep_every=keep_every, damaged=self._damaged)

    def abandon_after(self, step: int) -> list[int]:
        """Hide the checkpoints after `step`, the step a run went back to; the next good save deletes them."""
        self.wait()
        return self.ranks.first("abandon", lambda: folder.abandon_after(self.directory, step))

    # ---- finding and loading

    def steps(self) -> list[int]:
        """The steps whose checkpoints are visible, ascending; damaged ones included. Not collective."""
        return folder.list_steps(self.directory)

    def path(self, step: int) -> Path:
        """The directory of a step's checkpoint."""
        return self.directory / manifests.step_name(step)

    def newest_valid(self) -> Path | None:
        """The newest checkpoint whose every file is what its manifest says, or None; the same on every rank.

        Damaged ones are skipped with a warning that names the file and the reason.
        """
        self.wait()
        for step in reversed(self.ranks.first("list", self._listed)):
            path = self.path(step)
            problem = self._verify(path)
            if problem is None:
                return path
            self._damaged.add(step)
            if self.ranks.rank == 0:
                logger.warning("checkpoint of step %d is skipped: %s", step, problem)
        return None

    def _listed(self) -> list[int]:
        folder.recover(self.directory)
        return self.steps()

    def read_manifest(self, step_or_path: int | str | Path) -> dict[str, Any]:
        """The manifest of a checkpoint; not collective, opens no tensor file. Raises CheckpointError."""
        return manifests.read_manifest(self._where(step_or_path))

    def load(self, step_or_path: int | str | Path, tensors: Tensors, *, partial: bool = False) -> dict[str, Any]:
        """Verify a checkpoint, fill `tensors` in place, return its manifest.

        partial: the checkpoint may hold tensors that nobody asks for (weights without the optimizer).
        Raises CheckpointError when it is damaged, ValueError when it is of another model; on every rank.
        """
        self.wait()
        path = self._where(step_or_path)
        pieces = as_pieces(tensors, ranks=self.ranks.size)
        problem = self._verify(path)
        if problem is not None:
            raise CheckpointError(f"the checkpoint {path} cannot be loaded: {problem}")
        manifest = self.ranks.first("manifest", lambda: manifests.read_manifest(path))
        wanted = manifests.tensor_entries(pieces)
        differences = self.ranks.agree(
            "compare", lambda: manifests.tensor_differences(manifest["tensors"], wanted, partial=partial)
        )
        if any(differences):
            raise ValueError(f"{path} holds another model: {next(filter(None, differences))}")
        read_pieces(path, pieces, files=manifest["files"], group=self.ranks.group)
        return manifest

    def _where(self, step_or_path: int | str | Path) -> Path:
        return self.path(step_or_path) if isinstance(step_or_path, int) else Path(step_or_path)

    def _verify(self, path: Path) -> str | None:
        """One verdict for all ranks; each hashes its share of the files that were not verified before."""

        def first_look() -> tuple[str | None, dict[str, Any], str]:
            try:
                manifest = manifests.read_manifest(path)
                return directory_problem(path, manifest), manifest["files"], _signature(path, manifest)
            except Exception as error:
                return error_text(error), {}, ""

        problem, files, signature = self.ranks.first("look", first_look)
        if problem is None and self._verified.get(path) != signature:
            by_size = sorted(files, key=lambda name: (-files[name]["size"], name))
            mine = by_size[self.ranks.rank :: self.ranks.size]
            found = self.ranks.agree("verify", lambda: [file_problem(path / name, files[name]) for name in mine])
            problem = next((text for texts in found for text in texts if text), None)
        if problem is None:
            self._verified[path] = signature
        return problem


def as_pieces(tensors: Tensors, *, ranks: int) -> dict[str, Piece]:
    """Plain tensors stand for themselves in a single process; several ranks must say what they hold."""
    plain = [name for name, value in tensors.items() if not isinstance(value, Piece)]
    if plain and ranks > 1:
        raise TypeError(f"{plain[:5]} are plain tensors; on {ranks} ranks every tensor must be a Piece")
    return {name: v if isinstance(v, Piece) else Piece.whole(v) for name, v in tensors.items()}


def _leave_mark(directory: Path) -> tuple[str, bool]:
    """The mark's name, and whether the directory was made for it."""
    name, made = f".tmp-shared-{uuid.uuid4().hex}", not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).touch()
    return name, made


def _take_mark(mark: Path, made: bool) -> None:
    mark.unlink()
    if made:
        mark.parent.rmdir()


def _signature(path: Path, manifest: dict[str, Any]) -> str:
    """Changes when a file of the checkpoint is replaced or written."""
    parts = [manifests.MANIFEST, *manifest["files"]]
    stats = []
    for name in parts:
        try:
            stat = (path / name).stat()
            stats.append((name, stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except OSError:
            stats.append((name, 0, 0, 0))
    return repr(stats)
