"""Our writer against the format's own package."""

from __future__ import annotations

import io
import json

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.parallel.global_view import Piece
from megatron_lite.tensor_files import write_safetensors
from tests.checkpoint.processes import as_bytes

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool]


@given(st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES)), max_size=6))
def test_the_package_reads_it(cases):
    tensors = {f"näme.{i}": torch.randn(shape).mul(3).to(dtype) for i, (shape, dtype) in enumerate(cases)}
    file = io.BytesIO()
    write_safetensors(file, {n: Piece.whole(t) for n, t in tensors.items()}, metadata={"format": "pt"})
    found = safetensors.torch.load(file.getvalue())
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert as_bytes(found[name]).equal(as_bytes(tensor))
    length = int.from_bytes(file.getvalue()[:8], "little")
    header = json.loads(file.getvalue()[8 : 8 + length])
    assert all((8 + length + header[n]["data_offsets"][0]) % t.itemsize == 0 for n, t in tensors.items())  # aligned


def test_a_dtype_without_a_name():
    with pytest.raises(ValueError, match=r"'model.c' has dtype torch.complex64"):
        write_safetensors(io.BytesIO(), {"model.c": Piece.whole(torch.zeros(2, dtype=torch.complex64))}, metadata={})
