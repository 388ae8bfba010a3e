"""Tensors on disk, read slice by slice and written one by one: the interface of all weight sources, and what reads and writes bytes.

Notable features
- All tensor values are read by `read_slice`.
- Nothing is mapped: what was read counts as memory only as long as it is used.
- `write_safetensors` writes straight from the tensors' memory. The `safetensors` package builds the whole file in memory first, holding
  Python's lock: half a second for 256 MiB, during which a background save would block the training loop. Hashing and writing
  release it. The package reads the result, which the tests check.

    8 bytes: length n of the header | n bytes: JSON {name: {dtype, shape, data_offsets}, __metadata__} | the tensors

Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_lite.narrowing import narrow

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_OPEN_FILES = 4
_READ_BYTES = 2**24  # of whole rows that are read to cut columns out of them
_FEW_COLUMNS = 4  # where less than one of so many columns is needed, rows are not read whole


class TensorSource(Protocol):
    """Tensors on disk by global name. Making one reads headers only; values come slice by slice, from `read`."""

    def names(self) -> Collection[str]:
        """All names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The global shape. Raises KeyError for an unknown name."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype on disk, which `read` keeps."""

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The slice of shape `sizes` that begins at `offsets`, on the CPU."""


def read_whole(source: TensorSource, name: str) -> Tensor:
    """The whole global tensor."""
    shape = source.shape(name)
    return source.read(name, (0,) * len(shape), shape)


class WholeTensors(Mapping[str, Tensor]):
    """The whole tensors of a source by name, read again each time they are asked for; in another dtype if one is given.

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

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor, without reading it."""
        return self._dtype or self.source.dtype(name)


class TensorFile:
    """An opened safetensors file, whose header the `safetensors` package has checked. Raises ValueError naming a file that is missing or
    damaged.

    Values are read and not mapped: a mapped file counts as memory of this process as far as it was read, and a model is pruned or
    converted in the memory of a few tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._header = safe_open(path, framework="pt", device="cpu")
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing; is the copy or the download complete?") from error
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or not a safetensors file ({error}); fetch it again") from error
        self._descriptor: int | None = None
        self._places: dict[str, int] = {}  # where in the file a tensor begins

    def names(self) -> list[str]:
        """All tensors of the file."""
        return list(self._header.keys())

    def metadata(self) -> dict[str, str]:
        """The header's own entry."""
        return self._header.metadata() or {}

    def shape(self, name: str) -> tuple[int, ...]:
        """As the header says it."""
        return tuple(self._header.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As the header says it: `F32`, ..."""
        return self._header.get_slice(name).get_dtype()

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The slice of shape `sizes` at `offsets`, which must be inside the tensor."""
        shape, dtype = self.shape(name), self._dtype(name)
        made = torch.empty(tuple(sizes), dtype=dtype)
        if not made.numel():
            return made
        begin = self._begin(name)
        row = math.prod(shape[1:]) * dtype.itemsize
        if tuple(sizes[1:]) == shape[1:]:
            self._fill(made, begin + (offsets[0] * row if shape else 0))
            return made
        inside = tuple(slice(start, start + size) for start, size in zip(offsets[1:], sizes[1:]))
        if len(shape) == 2 and sizes[1] * _FEW_COLUMNS <= shape[1]:  # a part of every row: the rest stays on the disk
            for number, part in enumerate(made, offsets[0]):
                self._fill(part, begin + number * row + offsets[1] * dtype.itemsize)
            return made
        step = max(1, _READ_BYTES // row)
        for first in range(0, sizes[0], step):
            rows = torch.empty(min(step, sizes[0] - first), *shape[1:], dtype=dtype)
            self._fill(rows, begin + (offsets[0] + first) * row)
            made[first : first + step] = rows[(slice(None), *inside)]
        return made

    def _dtype(self, name: str) -> torch.dtype:
        dtype = self.dtype(name)
        if dtype not in DTYPES:
            raise ValueError(f"{self.path}: {name} is stored as {dtype}; only {', '.join(DTYPES)} can be read")
        return DTYPES[dtype]

    def _begin(self, name: str) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            (length,) = struct.unpack("<Q", os.pread(self._descriptor, 8, 0))
            header = json.loads(os.pread(self._descriptor, length, 8))
            self._places = {
                key: 8 + length + entry["data_offsets"][0] for key, entry in header.items() if key[:2] != "__"
            }
        return self._places[name]

    def _fill(self, tensor: Tensor, start: int) -> None:
        """Read the bytes of a contiguous tensor, which begin at `start`."""
        assert self._descriptor is not None
        view = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        while view:
            count = os.preadv(self._descriptor, [view], start)
            if not count:
                raise ValueError(f"{self.path} is shorter than its header says; fetch it again")
            view, start = view[count:], start + count

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]


class TensorFiles:
    """The safetensors files of one folder, opened when first needed; few are open at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, TensorFile] = {}

    def __getitem__(self, file_name: str) -> TensorFile:
        """The opened file. Raises ValueError naming a file that is missing or damaged."""
        opened = self._open.pop(file_name, None) or TensorFile(self.folder / file_name)
        self._open[file_name] = opened  # the one used last is the last in the dict
        if len(self._open) > _OPEN_FILES:
            del self._open[next(iter(self._open))]
        return opened


def read_slice(file: TensorFile, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The slice of shape `sizes` at `offsets` of the tensor `name` in an opened file: nothing else of it is read.

    Every value of every tensor is read here. Raises ValueError when the slice is not inside the tensor.
    """
    shape = file.shape(name)
    inside = len(shape) == len(sizes) == len(offsets) and all(
        start >= 0 and start + size <= length for start, size, length in zip(offsets, sizes, shape)
    )
    if not inside:
        raise ValueError(f"a slice of shape {tuple(sizes)} at {tuple(offsets)} is not inside {name!r}, {tuple(shape)}")
    return file.read(name, offsets, sizes)


class Sink(Protocol):
    """What the file is written to; `write` takes any buffer and writes all of it."""

    def write(self, data: Any) -> int: ...


class Part(Protocol):
    """A tensor to be written (a `global_view.Piece` is one)."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Its dtype."""

    def tensor(self) -> Tensor:
        """Its values."""


def write_safetensors(sink: Sink, parts: Mapping[str, Part], *, metadata: Mapping[str, str]) -> None:
    """Write a file with these tensors (on the CPU or a GPU), each made when it is written, in their order but the widest numbers first.

    Raises ValueError for a dtype that the format does not have.
    """
    # widest numbers first, as the package does: every tensor then begins at a multiple of its own width
    names = sorted(parts, key=lambda name: -_part_dtype(name, parts[name]).itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        part, dtype = parts[name], _part_dtype(name, parts[name])
        start, end = end, end + math.prod(part.sizes) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(part.sizes), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sink.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        sink.write(tensor_bytes(parts[name].tensor()))


def _part_dtype(name: str, part: Part) -> torch.dtype:
    if part.dtype not in _NAMES:
        raise ValueError(f"{name!r} has dtype {part.dtype}, which a checkpoint cannot hold")
    return part.dtype


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; its own memory where it is a contiguous CPU tensor."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    array: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(array)
