"""Tensors on disk, read slice by slice: the interface of all weight sources, and the two functions that read bytes.

Notable features
- All tensor values are read by `read_slice`, and all hashes are computed by `block_digest`. It works block by block, so that
  several processes can share even a single file.
- `TensorFiles` keeps few files open: a mapped file counts as this process's memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_lite.narrowing import narrow

BLOCK = 2**20  # bytes that are hashed as one; a part of checkpoint format 2
_OPEN_FILES = 4


class TensorSource(Protocol):
    """Tensors on disk by global name. Making one reads headers only; values come slice by slice, from `read`."""

    def names(self) -> Collection[str]:
        """All names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The global shape. Raises KeyError for an unknown name."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype on disk, which `read` keeps."""

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The slice of shape `sizes` that begins at `offsets`, on the CPU. It may be a view into a mapped file: copy it."""


def read_whole(source: TensorSource, name: str) -> Tensor:
    """The whole global tensor."""
    shape = source.shape(name)
    return source.read(name, (0,) * len(shape), shape)


class WholeTensors(Mapping[str, Tensor]):
    """The whole tensors of a source by name, read anew each time they are asked for; in another dtype if one is given.

    A tensor whose values do not fit that dtype raises ValueError (`narrow`).
    """

    def __init__(self, source: TensorSource, dtype: torch.dtype | None = None) -> None:
        self.source, self._dtype = source, dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = read_whole(self.source, name)
        return tensor if self._dtype is None else narrow(name, tensor, self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.source.names())

    def __len__(self) -> int:
        return len(self.source.names())


class TensorFiles:
    """The safetensors files of one folder, opened when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}

    def __getitem__(self, file_name: str) -> Any:
        """The opened file (`keys()`, `metadata()`, `get_slice(name)`). Raises ValueError naming a file that is missing or damaged."""
        opened = self._open.pop(file_name, None) or open_tensor_file(self.folder / file_name)
        self._open[file_name] = opened  # the one used last is the last in the dict
        if len(self._open) > _OPEN_FILES:
            del self._open[next(iter(self._open))]
        return opened


def open_tensor_file(path: Path) -> Any:
    """The opened safetensors file; only its header is read. Raises ValueError naming a file that is missing or damaged."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; is the copy or the download complete?") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); fetch it again") from error


def read_slice(file: Any, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The slice of shape `sizes` at `offsets` of the tensor `name` in an opened file: nothing else of it is read.

    Every value of every tensor is read here. Raises ValueError when the slice is not inside the tensor.
    """
    if not sizes:
        return file.get_tensor(name)
    found = file.get_slice(name)
    shape = found.get_shape()
    inside = len(shape) == len(sizes) == len(offsets) and all(
        start >= 0 and start + size <= length for start, size, length in zip(offsets, sizes, shape)
    )
    if not inside:
        raise ValueError(f"a slice of shape {tuple(sizes)} at {tuple(offsets)} is not inside {name!r}, {tuple(shape)}")
    if not math.prod(shape):
        return file.get_tensor(name)
    return found[tuple(slice(start, start + size) for start, size in zip(offsets, sizes))]


class BlockHash:
    """A hash of a file that several processes can compute together: the SHA-256 of the SHA-256s of its blocks of `BLOCK` bytes."""

    def __init__(self) -> None:
        self._digests: list[bytes] = []
        self._block, self._filled = hashlib.sha256(), 0

    def update(self, data: memoryview) -> None:
        """Go on with bytes of any number."""
        while data:
            part, data = data[: BLOCK - self._filled], data[BLOCK - self._filled :]
            self._block.update(part)
            self._filled += len(part)
            if self._filled == BLOCK:
                self._close_block()

    def hexdigest(self) -> str:
        """The hash of all that came; nothing may come after it."""
        if self._filled:
            self._close_block()
        return hash_of_blocks(b"".join(self._digests))

    def _close_block(self) -> None:
        self._digests.append(self._block.digest())
        self._block, self._filled = hashlib.sha256(), 0


def hash_of_blocks(digests: bytes) -> str:
    """What `BlockHash` makes of the digests of all blocks."""
    return hashlib.sha256(digests).hexdigest()


def block_digest(path: Path, block: int | None) -> bytes:
    """The SHA-256 of block `block` of a file, None: of the whole file. Every byte that is hashed from a disk is read here."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        if block is not None:
            stream.seek(block * BLOCK)
            digest.update(stream.read(BLOCK))
            return digest.digest()
        while data := stream.read(BLOCK):
            digest.update(data)
    return digest.digest()
