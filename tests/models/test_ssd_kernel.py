"""Mamba-2's scan as simple gated linear attention: a GPU's kernel is given what `ssd` computes from."""

from __future__ import annotations

import sys

import pytest
import torch

from megatron_lite.models import ssd_kernel
from megatron_lite.models.scan import Operands, Past
from megatron_lite.models.ssd import ssd


def simple_gla(*, q, k, v, g, scale, initial_state, output_final_state):
    """S_t = exp(g_t) S_(t-1) + k_t v_t^T, o_t = scale S_t^T q_t, token by token, for q, k (B, T, H, K), v (B, T, H, V), g (B, T, H)."""
    assert output_final_state
    batch, length, heads, keys = q.shape
    state = torch.zeros(batch, heads, keys, v.shape[-1], dtype=v.dtype) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        state = g[:, t, :, None, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state


def inputs(length: int, groups: int) -> list[torch.Tensor]:
    """x, dt, A, B, C and a state in float64."""
    torch.manual_seed(length)
    heads = 2 * groups
    made = [
        torch.randn(2, length, heads, 3),
        torch.rand(2, length, heads),
        -4 * torch.rand(heads),
        torch.randn(2, length, groups, 5),
        torch.randn(2, length, groups, 5),
        torch.randn(2, heads, 3, 5),
    ]
    return [value.double().requires_grad_() for value in made]


@pytest.mark.parametrize(("length", "groups", "with_state"), [(1, 1, True), (70, 2, True), (67, 3, False)])
def test_the_kernels_recurrence_is_that_of_ssd(length: int, groups: int, with_state: bool) -> None:
    leaves = inputs(length, groups)[: 6 if with_state else 5]
    operands, state = Operands(*leaves[:5]), leaves[5] if with_state else None
    found = ssd_kernel.by_kernel(simple_gla, operands, state)
    wanted = ssd(operands, Past(state))
    weights = [torch.randn_like(t) for t in wanted]
    for pair in zip(found, wanted):
        assert torch.allclose(*pair, rtol=0, atol=1e-12 * float(pair[1].detach().abs().max()))  # sums in another order
    grads = [torch.autograd.grad(sum((t * w).sum() for t, w in zip(r, weights)), leaves) for r in (found, wanted)]
    for ours, theirs in zip(*grads):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12 * float(theirs.abs().max()) + 1e-300)


def test_a_cpu_takes_ssd_and_imports_nothing() -> None:
    *operands, state = inputs(9, 1)
    found, _ = ssd_kernel.scan(Operands(*operands), Past(state))
    wanted, _ = ssd(Operands(*operands), Past(state))
    assert torch.equal(found, wanted)
    assert "fla" not in sys.modules
