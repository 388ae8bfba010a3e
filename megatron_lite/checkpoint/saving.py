"""The protocol that makes a checkpoint whole or not there.

    prepare    rank 0 clears leftovers and makes .tmp-step_X
    replicas   pieces that several tensor-parallel ranks hold are compared
    write      every rank writes its safetensors, hashed from memory, fsynced
    hash       (file, size, sha256) and error texts are gathered
    commit     rank 0 writes manifest.json, fsyncs, renames to step_X, fsyncs the parent

After each phase all ranks agree: either all go on or all raise the same error, the temporary directory is
removed and older checkpoints stay as they are.
"""

from __future__ import annotations

import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint import directory as folder
from megatron_lite.checkpoint import manifest as manifests
from megatron_lite.checkpoint.directory import file_problem, fsync_directory
from megatron_lite.checkpoint.safetensors_file import tensor_bytes
from megatron_lite.checkpoint.storage import FileEntries, OpenStream, write_pieces
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.global_view import Piece
from megatron_lite.ranks import Ranks

Box = tuple[str, tuple[int, ...]]  # a tensor's name and where in it the box begins


class Saver:
    """Writes checkpoints below `directory`, collectively over `ranks`; `open_stream` opens every file."""

    def __init__(self, directory: Path, ranks: Ranks, *, file_bytes: int, open_stream: OpenStream) -> None:
        self.directory = directory
        self.ranks = ranks
        self.file_bytes = file_bytes
        self._open_stream = open_stream

    def write(self, step: int, pieces: dict[str, Piece], state: dict[str, Any]) -> None:
        """Raises CheckpointError on every rank, naming the step, the rank and the reason."""
        temporary = self.directory / f".tmp-{manifests.step_name(step)}"
        try:
            self.ranks.agree("prepare", lambda: self._prepare(temporary, state))
            self._check_replicas(pieces)
            written = write_pieces(
                temporary,
                pieces,
                group=self.ranks.group,
                file_bytes=self.file_bytes,
                open_stream=self._open_stream,
            )
            everyone = self.ranks.agree("hash", lambda: self._flushed(temporary, written))
            files = {name: entry for entries in everyone for name, entry in sorted(entries.items())}
            self.ranks.first("commit", lambda: self._commit(step, temporary, pieces, state, files))
        except Exception as error:
            if self.ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"the checkpoint of step {step} was not saved: {error}") from error

    def _prepare(self, temporary: Path, state: dict[str, Any]) -> None:
        manifests.check_state(state)
        if self.ranks.rank == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            folder.clean(self.directory, keep_abandoned=True)
            temporary.mkdir()

    def _check_replicas(self, pieces: dict[str, Piece]) -> None:
        """What several tensor-parallel ranks hold must be the same bytes: else a gradient was not reduced."""
        if self.ranks.size == 1:
            return
        seen: dict[Box, tuple[int, int]] = {}
        for rank, digests in enumerate(self.ranks.agree("replicas", lambda: _digests(pieces))):
            for box, digest in digests.items():
                first, expected = seen.setdefault(box, (rank, digest))
                if digest != expected:
                    raise CheckpointError(
                        f"{box[0]!r} is replicated over tensor parallelism but differs between ranks {first} and {rank}"
                    )

    def _flushed(self, temporary: Path, written: FileEntries) -> FileEntries:
        fsync_directory(temporary)
        return written

    def _commit(
        self, step: int, temporary: Path, pieces: dict[str, Piece], state: dict[str, Any], files: FileEntries
    ) -> None:
        for name, entry in files.items():
            problem = file_problem(temporary / name, entry, hashed=False)
            if problem:
                raise CheckpointError(f"{problem}; do all ranks see the same directory?")
        tensors = manifests.tensor_entries(pieces)
        body = manifests.build(step, state, world_size=self.ranks.size, tensors=tensors, files=files)
        with self._open_stream(temporary / manifests.MANIFEST) as stream:
            stream.write(manifests.encode(body))
            stream.flush()
            os.fsync(stream.fileno())
        fsync_directory(temporary)
        folder.publish(temporary, self.directory / manifests.step_name(step))


def _digests(pieces: dict[str, Piece]) -> dict[Box, int]:
    digests = {}
    for name, piece in pieces.items():
        if piece.replica and piece.local.numel():
            digests[name, piece.offsets] = zlib.crc32(tensor_bytes(piece.local))
    return digests


class Staging:
    """Buffers by tensor name; pinned for tensors that lie on a GPU, so that the copies overlap each other."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def copy(self, pieces: dict[str, Piece]) -> dict[str, Piece]:
        """The pieces with their values copied; done when this returns, so training may write on."""
        on_gpu = False
        staged = {}
        self._buffers = {name: buffer for name, buffer in self._buffers.items() if name in pieces}
        for name, piece in pieces.items():
            source = piece.local.detach()
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                self._buffers[name] = buffer
            buffer.copy_(source, non_blocking=source.is_cuda)
            on_gpu |= source.is_cuda
            staged[name] = piece.with_local(buffer)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return staged
