"""Rotary positions against complex multiplication, and restarting positions against a loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.models.rope import apply_rotary, restarting_positions, rotary_tables


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 8), (8, 4), (12, 6)])
def test_rotation_is_multiplication_by_a_unit_complex_number(head_dim, rotary_dim):
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 2, head_dim, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 3]])
    y = apply_rotary(x, *rotary_tables(positions, rotary_dim, 100.0, dtype=torch.float64))
    half = rotary_dim // 2
    pair = torch.complex(x[..., :half], x[..., half:rotary_dim])
    for j in range(half):
        angle = positions.double() * 100.0 ** (-2 * j / rotary_dim)
        turned = pair[..., j] * torch.polar(torch.ones_like(angle), angle)[:, :, None, None]
        # float64 has 2e-16; tables in float32 would be off by 1e-7
        torch.testing.assert_close(y[..., j], turned.real, rtol=0, atol=1e-13)
        torch.testing.assert_close(y[..., half + j], turned.imag, rtol=0, atol=1e-13)
    assert torch.equal(y[..., rotary_dim:], x[..., rotary_dim:])


def test_bf16_heads_rotate_with_float32_angles():
    cos, sin = rotary_tables(torch.tensor([[4095]]), 4, 10000.0)
    assert cos.dtype == sin.dtype == torch.float32
    x = torch.ones(1, 1, 1, 1, 4, dtype=torch.bfloat16)
    y = apply_rotary(x, cos, sin)
    assert y.dtype == torch.bfloat16
    angle = torch.tensor(4095.0, dtype=torch.float64)
    # one bf16 rounding of the result (2^-9); angles rounded to bf16 would be whole radians off
    torch.testing.assert_close(y[0, 0, 0, 0, 0].double(), angle.cos() - angle.sin(), rtol=2**-8, atol=1e-4)


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5), min_size=1, max_size=3))
def test_positions_restart_with_every_document(rows):
    longest = max(sum(row) for row in rows)
    documents, expected = [], []
    for row in rows:
        lengths = [*row, longest - sum(row)]
        documents.append([d for d, n in enumerate(lengths) for _ in range(n)])
        expected.append([p for n in lengths for p in range(n)])
    assert restarting_positions(torch.tensor(documents)).tolist() == expected
