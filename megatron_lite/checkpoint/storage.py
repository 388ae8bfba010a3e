"""Deciding which rank writes which shards into which file, and writing them.

Notable features
- The plan is a local decision: tensors that are cut alike form groups, and the shards of one group with the
  same number make one file, `<group>-<number>.safetensors`. Ranks that hold copies of the same shards take
  the groups in turn. Names, shapes and degrees are the same everywhere, so all ranks arrive at one plan.
- A group holds one kind of tensor (`model`, `exp_avg`, ...), so that readers of weights need not open the optimizer's files,
  and about `file_bytes` a file, so that the ranks can share the verifying.
- Tensors that are made when needed are made one at a time.
- What is hashed is what the program meant to write, not what the disk gives back.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_lite.block_hash import BLOCK, BlockHash
from megatron_lite.checkpoint.manifest import file_name, tensor_entry
from megatron_lite.parallel.global_view import Piece, shard_index
from megatron_lite.tensor_files import write_safetensors

OpenStream = Callable[[Path], BinaryIO]
FileEntries = dict[str, dict[str, Any]]

_SMALL_FILE = 2**20  # copies do not share what is less than this: more files would cost more than they save


def open_for_writing(path: Path) -> BinaryIO:
    """How a checkpoint's file is opened; the store takes another opener (a test's slow or full disk)."""
    return open(path, "wb")


@dataclass(frozen=True)
class Group:
    """Tensors that are cut alike, and this rank's shards of them. `writes`: of all its copies, this rank writes them."""

    name: str
    pieces: dict[str, Piece]
    writes: bool

    @property
    def cuts(self) -> list[list[int]]:
        """[[dim, parts], ...]: with the shapes, all that there is to know about every file of the group."""
        return [[cut.dim, cut.parts] for cut in next(iter(self.pieces.values())).cuts]

    @property
    def index(self) -> int:
        """The number of this rank's shards."""
        return shard_index(next(iter(self.pieces.values())).cuts)

    def entries(self) -> dict[str, Any]:
        """The manifest's entries about the tensors of this group."""
        tensors = {name: tensor_entry(piece) | {"group": self.name} for name, piece in self.pieces.items()}
        return {"tensors": tensors, "groups": {self.name: self.cuts}}


def plan(pieces: dict[str, Piece], *, file_bytes: int) -> list[Group]:
    """The groups of all tensors that this rank holds shards of."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name in sorted(pieces):
        piece = pieces[name]
        cuts = tuple((cut.axis, cut.dim, cut.parts) for cut in piece.cuts)
        alike.setdefault((name.split(".")[0], cuts, piece.copies), []).append(name)
    groups: list[Group] = []
    for (kind, cuts, copies), names in sorted(alike.items()):
        sizes = {name: _nominal_bytes(pieces[name]) for name in names}
        limit = min(file_bytes, max(sum(sizes.values()) // copies, _SMALL_FILE))
        for members in _filled(sizes, limit):
            writes = len(groups) % copies == pieces[members[0]].copy
            groups.append(Group(_group_name(kind, cuts, members), {name: pieces[name] for name in members}, writes))
    return groups


def _nominal_bytes(piece: Piece) -> int:
    """About the size of a shard, the same on every rank."""
    assert piece.dtype is not None
    return math.prod(piece.global_shape) * piece.dtype.itemsize // math.prod(cut.parts for cut in piece.cuts)


def _filled(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """The names in order, in lists of at most `limit` bytes (or of one tensor)."""
    lists: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not lists or filled + size > limit:
            lists.append([])
            filled = 0
        lists[-1].append(name)
        filled += size
    return lists


def _group_name(kind: str, cuts: tuple[Any, ...], members: list[str]) -> str:
    """The same on every rank; another one where other tensors are grouped (another pipeline stage)."""
    digest = hashlib.sha256("\0".join([repr(cuts), *members]).encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_]', '_', kind) or '_'}-{digest[:12]}"


def write_groups(path: Path, groups: list[Group], *, open_stream: OpenStream = open_for_writing) -> FileEntries:
    """Write this rank's share below `path`, fsynced. Returns {file name: {size, blocks_sha256}}, hashed from memory."""
    written: FileEntries = {}
    for group in groups:
        pieces = {name: piece for name, piece in group.pieces.items() if math.prod(piece.sizes)}
        if group.writes and pieces:
            name = file_name(group.name, group.index)
            with open_stream(path / name) as raw:
                stream = _HashingStream(raw)
                write_safetensors(stream, pieces, metadata={"format": "pt"})
                raw.flush()
                os.fsync(raw.fileno())
            written[name] = {"size": stream.size, "blocks_sha256": stream.hash.hexdigest()}
    return written


class _HashingStream:
    """Hashes what is written before it is handed to the disk."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self.size = 0
        self.hash = BlockHash()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BLOCK):  # small enough for other threads to have their turn
            block = view[start : start + BLOCK]
            self.hash.update(block)
            self.raw.write(block)
        self.size += len(view)
        return len(view)
