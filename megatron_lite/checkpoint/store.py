"""The checkpoints of a run: saving in the foreground or background, finding the newest valid one, loading.

How a checkpoint becomes whole is in `saving.py`, how it is found and verified in `opening.py`: all ranks
load the same step, or all fall back to the same older one.

Notable features
- A process group of its own (gloo), so that a background save never comes between two collectives of the
  training.
- At most one save in flight; its error surfaces at the next `save`, `wait`, `newest_valid` or `load`, with
  its step.
- One process is the same code with `group=None`.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lite.checkpoint import directory as folder
from megatron_lite.checkpoint import manifest as manifests
from megatron_lite.checkpoint.opening import Verifier
from megatron_lite.checkpoint.reader import CheckpointTensors
from megatron_lite.checkpoint.saving import Saver, Staging
from megatron_lite.checkpoint.storage import OpenStream, open_for_writing
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.global_view import Piece
from megatron_lite.ranks import Ranks

logger = logging.getLogger(__name__)

Tensors = Mapping[str, Piece | torch.Tensor]


@dataclass
class CheckpointConfig:
    """When checkpoints are written, how, and which are kept."""

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
        self._verifier = Verifier(self.ranks)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

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
        blind = self.ranks.problems("look for the mark", lambda: None if mark.exists() else "blind")
        self.ranks.first("unmark", lambda: _take_mark(mark, made))
        if blind:
            raise CheckpointError(
                f"ranks {sorted(blind)} do not see {self.directory} as rank 0 does: run.dir must be on a shared file system"
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
        self._verifier.forget(self.path(step))
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
        damaged = {step for step in self.steps() if self.path(step) in self._verifier.damaged}
        keep, keep_every = self.config.keep, self.config.keep_every
        return folder.prune(self.directory, last=last, keep=keep, keep_every=keep_every, damaged=damaged)

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
        return self.newest_of(self.recovered_steps())

    def newest_of(self, steps: list[int]) -> Path | None:
        """The same among the checkpoints of `steps`."""
        self.wait()
        found = self._verifier.newest(self.directory, steps)
        return None if found is None else found.path

    def recovered_steps(self) -> list[int]:
        """`steps`, having put back what a crash in a save had moved away; the same on every rank."""
        self.wait()

        def listed() -> list[int]:
            folder.recover(self.directory)
            return self.steps()

        return self.ranks.first("list", listed)

    def find(self, path: str | Path) -> Path:
        """The checkpoint that a person means by `path`: itself, or a run directory's newest one that is not damaged.

        Raises ValueError when there is none, CheckpointError when the named one is damaged; on every rank.
        """
        self.wait()
        return self._verifier.find(path).path

    def read_manifest(self, step_or_path: int | str | Path) -> dict[str, Any]:
        """The manifest of a checkpoint; not collective, opens no tensor file. Raises CheckpointError."""
        return manifests.read_manifest(self._where(step_or_path))

    def load(
        self, step_or_path: int | str | Path, tensors: Tensors, *, optional: Collection[str] = ()
    ) -> dict[str, Any]:
        """Verify a checkpoint, fill `tensors` in place, return its manifest.

        optional: kinds of tensors (`<kind>.<name>`) that are left as they are unless both sides have them, with the same shape.
        Raises CheckpointError when it is damaged, ValueError when it is of another model; on every rank.
        """
        self.wait()
        path = self._where(step_or_path)
        pieces = as_pieces(tensors, ranks=self.ranks.size)
        found = self._verifier.open(path)
        pieces = {name: piece for name, piece in pieces.items() if not _is_left(name, piece, found, optional)}
        self._compare(found, pieces, optional=optional)
        self.ranks.agree("read", lambda: _fill(pieces, found))
        return found.manifest

    def _compare(self, found: CheckpointTensors, pieces: dict[str, Piece], *, optional: Collection[str]) -> None:
        """Raise ValueError on every rank when the checkpoint is of another model."""
        names = sorted(name for name in found.names() if _kind(name) not in optional)
        asked = self.ranks.sum("compare", torch.tensor([name in pieces for name in names], dtype=torch.int32))
        extra = [name for name, ranks in zip(names, asked.tolist()) if not ranks]
        saved = found.manifest["tensors"]
        differences = self.ranks.problems("compare", lambda: manifests.tensor_differences(saved, pieces, extra=extra))
        if differences:
            raise ValueError(f"{found.path} holds another model: {next(iter(differences.values()))}")

    def _where(self, step_or_path: int | str | Path) -> Path:
        return self.path(step_or_path) if isinstance(step_or_path, int) else Path(step_or_path)


def _kind(name: str) -> str:
    return name.split(".", 1)[0]


def _is_left(name: str, piece: Piece, found: CheckpointTensors, optional: Collection[str]) -> bool:
    return _kind(name) in optional and (name not in found.names() or found.shape(name) != piece.global_shape)


def as_pieces(tensors: Tensors, *, ranks: int) -> dict[str, Piece]:
    """In a single process plain tensors are whole tensors; several ranks must say what they hold."""
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


def _fill(pieces: dict[str, Piece], source: CheckpointTensors) -> None:
    for name, piece in pieces.items():
        if math.prod(piece.sizes):
            piece.tensor().detach().copy_(source.read(name, piece.offsets, piece.sizes))
