"""The tensors of one checkpoint as a `TensorSource`: any slice of any tensor, from whatever shards the files hold.

Notable features
- One reader for resumes, evaluation, conversion and starts from given weights, of both formats.
- Only files that the manifest names are opened, and of them only those that hold a part of the slice.
- Format 2's manifest says where each shard is. For format 1 (`DCP_SHARDING_INFO` in the files' headers, as
  `torch.distributed.checkpoint` wrote it) the headers are read once, by `header_shards`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from megatron_lite.checkpoint.manifest import dtype_from, file_name, group_of
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.global_view import Region, shards_within
from megatron_lite.tensor_files import TensorFile, TensorFiles, TensorSource, read_slice

Shards = dict[str, list[tuple[str, Region]]]  # tensor name -> [(file, region of the shard)]


class CheckpointTensors:
    """See `tensor_files.TensorSource`; also says which files hold which tensors. `read` raises CheckpointError.

    shards: of format 1, what `header_shards` found.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], shards: Shards | None = None) -> None:
        self.path, self.manifest = path, manifest
        self._shards = shards
        self._files = TensorFiles(path)

    def names(self) -> Collection[str]:
        """See `TensorSource`."""
        return self.manifest["tensors"].keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource`."""
        return tuple(self.manifest["tensors"][name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """See `TensorSource`."""
        return dtype_from(self.manifest["tensors"][name]["dtype"])

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """See `TensorSource`. Raises CheckpointError for damage, and for numbers that no file holds."""
        region = tuple(offsets), tuple(sizes)
        whole, filled = None, 0
        for file, shard in self._find(name, region):
            low = tuple(map(max, shard[0], region[0]))
            high = map(min, _ends(shard), _ends(region))
            part_sizes = tuple(end - start for start, end in zip(low, high))
            part = self._slice(file, name, shard, (low, part_sizes))
            if part_sizes == region[1]:
                return part
            whole = torch.empty(region[1], dtype=part.dtype) if whole is None else whole
            place = tuple(slice(a - o, a - o + n) for a, o, n in zip(low, offsets, part_sizes))
            whole[place].copy_(part)
            filled += part.numel()
        if filled != math.prod(sizes):
            raise self._missing(name)
        return torch.empty(region[1], dtype=self.dtype(name)) if whole is None else whole

    def files_of(self, names: Iterable[str]) -> set[str]:
        """The files of the manifest that hold any part of the named tensors."""
        if self._shards is not None:
            return {file for name in names for file, _ in self._shards[name]}
        groups = {self.manifest["tensors"][name]["group"] for name in names}
        return {file for file in self.manifest["files"] if group_of(file) in groups}

    def _find(self, name: str, region: Region) -> Iterator[tuple[str, Region]]:
        """(file, region of its shard) of all shards that hold a part of the region."""
        if self._shards is not None:
            for file, shard in self._shards[name]:
                if all(max(a, b) < min(c, d) for a, b, c, d in zip(shard[0], region[0], _ends(shard), _ends(region))):
                    yield file, shard
            return
        group = self.manifest["tensors"][name]["group"]
        for index, shard in shards_within(self.shape(name), self.manifest["groups"][group], region):
            file = file_name(group, index)
            if file not in self.manifest["files"]:
                raise self._missing(name)
            yield file, shard

    def _missing(self, name: str) -> CheckpointError:
        return CheckpointError(f"no file of the checkpoint {self.path} holds a part of {name!r} that is needed")

    def _slice(self, file: str, name: str, shard: Region, region: Region) -> Tensor:
        """A part of a shard; both regions in the global tensor."""
        try:
            opened = self._files[file]
            shape = opened.shape(name)
            if shape != shard[1]:
                raise ValueError(f"{self.path / file} holds {name!r} with shape {shape}, not {shard[1]}")
            part = read_slice(opened, name, [a - b for a, b in zip(region[0], shard[0])], region[1])
        except (ValueError, OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path / file} cannot be read: {error}") from error
        if part.dtype != self.dtype(name):
            raise CheckpointError(f"{self.path / file} holds {name!r} as {part.dtype}, not {self.dtype(name)}")
        return part


class Prefixed:
    """The tensors of a source whose names begin with `prefix`, named without it (`model.` for the weights)."""

    def __init__(self, source: TensorSource, prefix: str) -> None:
        self.source, self.prefix = source, prefix
        self._names = [name.removeprefix(prefix) for name in source.names() if name.startswith(prefix)]

    def names(self) -> Collection[str]:
        """See `TensorSource`."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource`."""
        return self.source.shape(self.prefix + name)

    def dtype(self, name: str) -> torch.dtype:
        """See `TensorSource`."""
        return self.source.dtype(self.prefix + name)

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """See `TensorSource`."""
        return self.source.read(self.prefix + name, offsets, sizes)


def header_shards(path: Path, manifest: dict[str, Any]) -> Shards | None:
    """Where format 1 holds each shard, from the headers of all its files; None for later formats. Raises CheckpointError."""
    if manifest["format_version"] != 1:
        return None
    shards: Shards = {name: [] for name in manifest["tensors"]}
    for file in sorted(manifest["files"]):
        try:
            opened = TensorFile(path / file)
            places = json.loads(opened.metadata().get("DCP_SHARDING_INFO", "{}"))
            for name in shards.keys() & set(opened.names()):
                offsets = tuple(places[name]["saved_offsets"])
                shards[name].append((file, (offsets, opened.shape(name))))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path / file} does not say where its shards begin: {error!r}") from error
    return shards


def _ends(region: Region) -> tuple[int, ...]:
    return tuple(map(sum, zip(*region)))
