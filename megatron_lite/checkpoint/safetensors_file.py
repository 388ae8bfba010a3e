"""Write one safetensors file straight from the tensors' memory.

    8 bytes: length n of the header | n bytes: JSON {name: {dtype, shape, data_offsets}, __metadata__} | the tensors

The `safetensors` package builds the whole file in memory first, holding Python's lock: half a second for 256 MiB, in
which a training loop beside a background save would stand still. Here nothing is copied, and hashing and writing
release the lock. Its reader, and DCP's, read the result; the tests hold it against both.
Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, Protocol

import torch

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Sink(Protocol):
    """What the file is written to; `write` takes any buffer and writes all of it."""

    def write(self, data: Any) -> int: ...


def write_safetensors(
    sink: Sink, tensors: Mapping[str, tuple[torch.Tensor, tuple[int, ...]]], *, metadata: Mapping[str, str]
) -> None:
    """Write `tensors`: name -> (CPU or GPU tensor, offsets of its box in the global tensor).

    The offsets go where DCP's reader looks for them. Raises ValueError for a dtype the format or DCP has not.
    """
    # widest numbers first, as the package does: every tensor then begins at a multiple of its own width
    names = sorted(tensors, key=lambda name: (-tensors[name][0].element_size(), name))
    places = {name: {"saved_offsets": list(tensors[name][1])} for name in names}
    header: dict[str, Any] = {"__metadata__": {**metadata, "DCP_SHARDING_INFO": json.dumps(places)}}
    end = 0
    for name in names:
        tensor = tensors[name][0]
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name!r} has dtype {tensor.dtype}, which a checkpoint cannot hold")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sink.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        sink.write(tensor_bytes(tensors[name][0]))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; its own memory where it is a contiguous CPU tensor."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    array: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(array)
