"""When mamba-ssm's kernel computes Mamba-1's scan, and that what it is given is what `selective_scan` computes from."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from megatron_lite.models import selective_scan_kernel
from megatron_lite.models.scan import Operands, Past
from megatron_lite.models.selective_scan import selective_scan
from tests.models.test_selective_scan import inputs_of

STATE, DOCUMENTS = torch.zeros(2, 4, 3), torch.zeros(2, 8, dtype=torch.long)


def published(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, return_last_state: bool):
    """What `selective_scan_fn` is documented to compute of u, delta (B, D, L), A (D, N), B, C (B, N, L): as the paper's algorithm 2."""
    assert return_last_state
    assert len({tensor.dtype for tensor in (u, delta, A, B, C)}) == 1
    assert all(tensor.stride(-1) == 1 for tensor in (u, delta, B, C))
    decay = torch.exp(torch.einsum("bdl,dn->lbdn", delta, A))
    added = torch.einsum("bdl,bnl,bdl->lbdn", delta, B, u)
    states = [torch.zeros_like(added[0])]
    for kept, new in zip(decay, added):
        states.append(kept * states[-1] + new)
    return torch.einsum("lbdn,bnl->bdl", torch.stack(states[1:]), C), states[-1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_kernels_recurrence_is_that_of_the_scan(dtype: torch.dtype, tolerance: float) -> None:
    """Values, gradients and the last state; of the largest entry, for the rounding of 150 sums."""
    leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs_of(150, 2.0, 0)[:5]]
    found = selective_scan_kernel.by_kernel(published, Operands(*leaves))
    wanted = selective_scan(Operands(*leaves))
    weight = torch.randn_like(wanted[0])
    gradients = [torch.autograd.grad((y * weight).sum(), leaves) for y, _ in (found, wanted)]
    for ours, theirs in [*zip(found, wanted), *zip(*gradients)]:
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_low_precision_keeps_the_digits_of_time_steps() -> None:
    """The kernel wants one dtype for all; x, B and C get that of dt, and their gradients come back in bf16."""
    x, dt, A, B, C, _ = (tensor.float() for tensor in inputs_of(8, 2.0, 0))
    leaves = [leaf.requires_grad_() for leaf in (x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16())]
    y, _ = selective_scan_kernel.by_kernel(published, Operands(*leaves))
    assert y.dtype is torch.float32
    y.sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]


def test_its_last_state_has_no_gradient() -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs_of(8, 2.0, 0)[:5]]
    _, state = selective_scan_kernel.by_kernel(published, Operands(*leaves))
    with pytest.raises(RuntimeError, match="no gradient of its last state"):
        state.sum().backward()


@pytest.mark.parametrize(
    ("device", "dtype", "past", "states", "fits"),
    [
        ("cuda", torch.float32, Past(), 16, True),
        (
            "cuda",
            torch.float32,
            Past(prefix=5),
            256,
            True,
        ),  # without documents a prefix is the beginning of the sequence
        ("cuda", torch.float32, Past(STATE), 16, False),
        ("cuda", torch.float32, Past(documents_BT=DOCUMENTS), 16, False),
        ("cuda", torch.float64, Past(), 16, False),
        ("cuda", torch.float32, Past(), 257, False),
        ("cpu", torch.float32, Past(), 16, False),
    ],
)
def test_when_it_is_chosen(device: str, dtype: torch.dtype, past: Past, states: int, fits: bool) -> None:
    assert selective_scan_kernel.kernel_fits(device, dtype, past, states=states) == fits


def test_a_cpu_takes_the_scan_and_imports_nothing() -> None:
    *operands, state = inputs_of(9, 2.0, 0)
    for past in (Past(), Past(state)):
        found, wanted = (scan(Operands(*operands), past) for scan in (selective_scan_kernel.scan, selective_scan))
        assert all(torch.equal(*pair) for pair in zip(found, wanted))
    assert "mamba_ssm" not in sys.modules


def test_an_installed_kernel_is_taken_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    operands, calls = Operands(*inputs_of(9, 2.0, 0)[:5]), []
    monkeypatch.setattr(
        selective_scan_kernel, "installed_kernel", lambda: lambda *a, **k: calls.append(1) or published(*a, **k)
    )
    for fits in (True, False):
        monkeypatch.setattr(selective_scan_kernel, "kernel_fits", lambda *a, fits=fits, **k: fits)
        selective_scan_kernel.scan(operands)
        assert len(calls) == 1
