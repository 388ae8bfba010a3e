"""The protocol that makes a save atomic.

    prepare    rank 0 clears leftovers and makes .tmp-step_X
    replicas   shards that several tensor-parallel ranks hold are compared
    write      every rank writes its files, hashed from memory, fsynced; rank 0 learns their names and hashes
    commit     rank 0 writes manifest.json, fsyncs, renames to step_X, fsyncs the parent

After each phase all ranks agree: either all continue or all raise the same error, the temporary directory is
removed and older checkpoints stay as they are.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch

from megatron_lite.atomic import fsync
from megatron_lite.checkpoint import directory as folder
from megatron_lite.checkpoint import manifest as manifests
from megatron_lite.checkpoint.directory import size_problem
from megatron_lite.checkpoint.storage import Group, OpenStream, plan, write_groups
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.global_view import Piece, shards_within
from megatron_lite.ranks import Ranks
from megatron_lite.tensor_files import tensor_bytes

_SLOTS = 1024  # sums that stand for all replicated tensors; a tensor's name says which one it goes into


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
            groups = plan(pieces, file_bytes=self.file_bytes)
            everyone = self.ranks.gather("write", lambda: self._written(temporary, groups))
            self.ranks.first("commit", lambda: self._commit(step, temporary, state, everyone))
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
        """What several tensor-parallel ranks hold must be the same bytes: else a gradient was not reduced.

        Of n equal copies the first adds n - 1 times its digest to a sum, each other one subtracts its own: what is left is 0.
        So the ranks exchange `_SLOTS` numbers, however many of them there are; digests only of what was found to differ.
        """
        if self.ranks.size == 1:
            return
        digests = self.ranks.agree("replicas", lambda: _digests(pieces))
        sums = [0] * _SLOTS
        for name, digest in digests.items():
            piece = pieces[name]
            sums[_slot(name)] += digest * (piece.copies - 1 if piece.copy == 0 else -1)
        total = self.ranks.sum("replicas", torch.tensor([_wrapped(value) for value in sums]))
        wrong = set(total.nonzero().flatten().tolist())
        if wrong:
            differing = {(name, pieces[name].offsets): d for name, d in digests.items() if _slot(name) in wrong}
            everyone = self.ranks.gather("replicas", lambda: differing)
            self.ranks.first("replicas", lambda: _name_the_ranks(everyone))

    def _written(self, temporary: Path, groups: list[Group]) -> dict[str, Any]:
        """Write this rank's files; what the manifest must say of them. The first shard's writer describes a group."""
        files = write_groups(temporary, groups, open_stream=self._open_stream)
        held: dict[str, Any] = {"tensors": {}, "groups": {}, "files": files}
        for group in groups:
            if group.writes and group.index == 0:
                for key, entries in group.entries().items():
                    held[key] |= entries
        fsync(temporary)
        return held

    def _commit(self, step: int, temporary: Path, state: dict[str, Any], everyone: list[dict[str, Any]]) -> None:
        held = {key: _union(key, everyone) for key in ("tensors", "groups", "files")}
        _check_complete(**held)
        for name, entry in held["files"].items():
            problem = size_problem(temporary / name, entry)
            if problem:
                raise CheckpointError(f"{problem}; do all ranks see the same directory?")
        body = manifests.build(step, state, world_size=self.ranks.size, held=held)
        with self._open_stream(temporary / manifests.MANIFEST) as stream:
            stream.write(manifests.encode(body))
            stream.flush()
            os.fsync(stream.fileno())
        fsync(temporary)
        folder.publish(temporary, self.directory / manifests.step_name(step))


def _union(key: str, everyone: list[dict[str, Any]]) -> dict[str, Any]:
    """The entries of all ranks under `key`. Raises CheckpointError if two ranks have the same entry."""
    found: dict[str, Any] = {}
    for rank, held in enumerate(everyone):
        twice = sorted(found.keys() & held[key].keys())
        if twice:
            raise CheckpointError(
                f"rank {rank} wrote {key} that another rank wrote too: {twice[:3]}; is its layout right?"
            )
        found |= held[key]
    return dict(sorted(found.items()))


def _check_complete(tensors: dict[str, Any], groups: dict[str, Any], files: dict[str, Any]) -> None:
    """Raise CheckpointError when the files do not hold every shard of every tensor, or hold others."""
    shapes: dict[str, list[tuple[int, ...]]] = {group: [] for group in groups}
    for entry in tensors.values():
        shapes[entry["group"]].append(tuple(entry["shape"]))
    needed: set[str] = set()
    for group, cuts in groups.items():
        numbers: set[int] = set()
        for shape in sorted(set(shapes[group]), key=math.prod, reverse=True):
            if len(numbers) < math.prod(parts for _, parts in cuts):  # else the largest one already has all numbers
                numbers |= {index for index, _ in shards_within(shape, cuts, ((0,) * len(shape), shape))}
        needed |= {manifests.file_name(group, index) for index in numbers}
    wrong = sorted(needed ^ files.keys())
    if wrong:
        raise CheckpointError(
            f"the ranks do not hold every shard exactly once: {', '.join(wrong[:3])} is "
            f"{'missing' if wrong[0] in needed else 'left over'}; do their layouts fit together?"
        )


def _digests(pieces: dict[str, Piece]) -> dict[str, int]:
    """Name -> 63 bits that stand for the bytes of a replicated shard and its place."""
    digests = {}
    for name, piece in pieces.items():
        if piece.replica and 0 not in piece.sizes:
            checksum = zlib.crc32(tensor_bytes(piece.tensor()))
            digests[name] = _hash(f"{name} {piece.offsets} {checksum}")
    return digests


def _name_the_ranks(everyone: list[dict[tuple[str, tuple[int, ...]], int]]) -> None:
    """Raise CheckpointError for the first shard of which two ranks hold different bytes."""
    seen: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}
    for rank, digests in enumerate(everyone):
        for shard, digest in digests.items():
            first, expected = seen.setdefault(shard, (rank, digest))
            if digest != expected:
                raise CheckpointError(
                    f"{shard[0]!r} is replicated over tensor parallelism but differs between ranks {first} and {rank}"
                )
    raise CheckpointError("the replicas of a tensor are not on the ranks that its layout names")


def _slot(name: str) -> int:
    return _hash(name) % _SLOTS


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def _wrapped(value: int) -> int:
    """The 64-bit integer that `value` overflows to."""
    return (value + 2**63) % 2**64 - 2**63


class Staging:
    """Buffers by tensor name; pinned for tensors on a GPU, so that the copies overlap each other."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def copy(self, pieces: dict[str, Piece]) -> dict[str, Piece]:
        """The shards with their values copied; done when this returns, so training may write on."""
        on_gpu = False
        staged = {}
        self._buffers = {name: buffer for name, buffer in self._buffers.items() if name in pieces}
        for name, piece in pieces.items():
            source = piece.tensor().detach()
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
