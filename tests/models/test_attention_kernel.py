"""The kernel is a function of device, dtype and mask, and all of them compute the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from megatron_lite.models.attention_kernel import ANY, EFFICIENT, FLASH, MATH, AttentionKernel, attention_kernel


@pytest.mark.parametrize(
    ("device", "dtype", "masked", "kernel"),
    [
        ("cuda", torch.bfloat16, False, FLASH),
        ("cuda", torch.bfloat16, True, EFFICIENT),
        ("cuda", torch.float32, False, EFFICIENT),
        ("cuda", torch.float32, True, EFFICIENT),
        ("cuda", torch.float64, False, MATH),
        ("cpu", torch.float32, True, ANY),
    ],
)
def test_table(device: str, dtype: torch.dtype, masked: bool, kernel: AttentionKernel) -> None:
    assert attention_kernel(device, dtype, masked=masked) is kernel


# the kernels of a GPU, as far as a CPU has them: flash, and math for memory-efficient
HERE = [MATH, FLASH, replace(EFFICIENT, backend=SDPBackend.MATH)]


@pytest.mark.parametrize("kernel", HERE, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("masked", [False, True])
def test_all_compute_the_same(kernel: AttentionKernel, masked: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8, generator=draw) for heads in (6, 2, 2))
    mask = torch.ones(5, 5, dtype=torch.bool).tril() if masked else None
    found = kernel(query, key, value, mask=mask, is_causal=not masked)
    each = F.scaled_dot_product_attention(
        query, *(torch.stack([x[:, head // 3] for head in range(6)], dim=1) for x in (key, value)), is_causal=True
    )
    assert torch.allclose(found, each, atol=1e-6)  # fp32 sums in another order


def test_a_kernel_that_cannot_run_says_so() -> None:
    query = torch.randn(1, 2, 4, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="kernel"):
        EFFICIENT(query, query, query, mask=None, is_causal=True)


def test_compiled_without_a_break() -> None:
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    compiled = torch.compile(lambda q, k: FLASH(q, k, k, mask=None, is_causal=True), backend="eager", fullgraph=True)
    assert torch.equal(compiled(query, key), FLASH(query, key, key, mask=None, is_causal=True))
