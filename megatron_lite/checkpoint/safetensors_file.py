"""Write one safetensors file straight from the tensors' memory.

    8 bytes: length n of the header | n bytes: JSON {name: {dtype, shape, data_offsets}, __metadata__} | the tensors

The `safetensors` package builds the whole file in memory first, holding Python's lock: half a second for 256 MiB, during
which a background save would block the training loop. Here nothing is copied, and hashing and writing
release the lock. The package reads the result, which the tests check.
Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from megatron_lite.parallel.global_view import Piece
from megatron_lite.tensor_files import DTYPES

_DTYPES = {dtype: name for name, dtype in DTYPES.items()}


class Sink(Protocol):
    """What the file is written to; `write` takes any buffer and writes all of it."""

    def write(self, data: Any) -> int: ...


def write_safetensors(sink: Sink, pieces: Mapping[str, Piece], *, metadata: Mapping[str, str]) -> None:
    """Write the local tensors of `pieces` (on the CPU or a GPU), one after the other.

    Raises ValueError for a dtype that the format does not have.
    """
    # widest numbers first, as the package does: every tensor then begins at a multiple of its own width
    names = sorted(pieces, key=lambda name: (-_dtype(name, pieces[name]).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        piece, dtype = pieces[name], _dtype(name, pieces[name])
        start, end = end, end + math.prod(piece.sizes) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(piece.sizes), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sink.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        sink.write(tensor_bytes(pieces[name].tensor()))


def _dtype(name: str, piece: Piece) -> torch.dtype:
    if piece.dtype not in _DTYPES:
        raise ValueError(f"{name!r} has dtype {piece.dtype}, which a checkpoint cannot hold")
    return piece.dtype


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; its own memory where it is a contiguous CPU tensor."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    array: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(array)
