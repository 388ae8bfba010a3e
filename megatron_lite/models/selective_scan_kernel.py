"""Which implementation computes Mamba-1's scan.

    device  documents  state before  dtype of dt  states   mamba-ssm   computed by
    cuda    none       none          fp32         <= 256   installed   its CUDA kernel `selective_scan_fn`
    any other                                                          `selective_scan.py`, whose chunks are compiled on a GPU

The kernel computes the same recurrence (Gu and Dao, arXiv 2312.00752), but from a zero state, in one document, and without the
gradient of the state that it leaves. It wants x, dt, B and C in one dtype: all get that of dt, so that time steps keep their digits.
Code that torch.compile traces is left to `selective_scan.py`, which is traceable.

Shapes: B batch, T sequence, C channels, N state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_lite.models.scan import NOTHING, Operands, Past
from megatron_lite.models.selective_scan import selective_scan

Kernel = Callable[..., tuple[Tensor, Tensor]]

MOST_STATES = 256


def scan(operands: Operands, past: Past = NOTHING) -> tuple[Tensor, Tensor]:
    """See `selective_scan`. The last state has no gradient where `past` has no state: going through it raises RuntimeError on a GPU."""
    dt_BTC, states = operands.dt, operands.A.shape[1]
    fits = kernel_fits(dt_BTC.device.type, dt_BTC.dtype, past, states=states)
    kernel = installed_kernel() if fits and not torch.compiler.is_compiling() else None
    return selective_scan(operands, past) if kernel is None else by_kernel(kernel, operands)


def kernel_fits(device_type: str, dtype: torch.dtype, past: Past, *, states: int) -> bool:
    """Whether the kernel can compute a scan with time steps of `dtype` on such a device: the table above."""
    whole = past.documents_BT is None and past.state is None
    return whole and device_type == "cuda" and dtype is torch.float32 and states <= MOST_STATES


@functools.cache
def installed_kernel() -> Kernel | None:
    """`selective_scan_fn`, if mamba-ssm is installed with its compiled parts."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn


def by_kernel(kernel: Kernel, operands: Operands) -> tuple[Tensor, Tensor]:
    """What `selective_scan` returns, computed by `selective_scan_fn` or something that takes its arguments: sequences come last there."""
    x_BCT, dt_BCT, B_BNT, C_BNT = (
        tensor.to(operands.dt.dtype).transpose(1, 2).contiguous()
        for tensor in (operands.x, operands.dt, operands.B, operands.C)
    )
    y_BCT, state_BCN = kernel(x_BCT, dt_BCT, operands.A.contiguous(), B_BNT, C_BNT, return_last_state=True)
    return y_BCT.transpose(1, 2), _WithoutGradient.apply(state_BCN)


class _WithoutGradient(torch.autograd.Function):
    """The identity, for a result whose gradient would silently be taken for zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()  # the kernel's is a view of all chunks' states

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError(
            "mamba-ssm's scan has no gradient of its last state; call it with an initial state, of zeros"
        )
