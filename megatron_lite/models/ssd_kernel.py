"""Which implementation computes Mamba-2's scan.

    device  dtype of x  documents  flash-linear-attention  computed by
    cuda    bf16, fp16  none       installed               its Triton kernel `chunk_simple_gla`
    any other                                              `ssd.py`

Simple gated linear attention is the same recurrence (arXiv 2312.06635; Mamba-2 in its terms: arXiv 2405.21060, section 4):

    S_t = exp(g_t) S_(t-1) + k_t v_t^T,  o_t = scale S_t^T q_t      with q = C, k = B, v = dt x, g = dt A, scale = 1

The kernel multiplies in the dtype of x (of fp32 it would keep 10 bits) and has no groups, so that B and C are repeated for the
heads of theirs. It takes documents only as one row whose borders the host knows, which would make every layer wait for the
device: rows with documents stay with `ssd`.

Shapes: B batch, T sequence, H heads in G groups, P head dim, N state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_lite.models.scan import NOTHING, Operands, Past
from megatron_lite.models.ssd import ssd

Kernel = Callable[..., tuple[Tensor, Tensor]]


def scan(operands: Operands, past: Past = NOTHING) -> tuple[Tensor, Tensor]:
    """See `ssd`."""
    x_BTHP = operands.x
    kernel = installed_kernel() if kernel_fits(x_BTHP.device.type, x_BTHP.dtype, past) else None
    return ssd(operands, past) if kernel is None else by_kernel(kernel, operands, past.state)


def kernel_fits(device_type: str, dtype: torch.dtype, past: Past) -> bool:
    """Whether the kernel can compute a scan of values of `dtype` on such a device: the table above."""
    return device_type == "cuda" and dtype.itemsize == 2 and past.documents_BT is None


@functools.cache
def installed_kernel() -> Kernel | None:
    """`chunk_simple_gla`, if flash-linear-attention is installed."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return None
    return chunk_simple_gla


def by_kernel(kernel: Kernel, operands: Operands, state_BHPN: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `ssd` returns for rows of one document, computed by `chunk_simple_gla` or something that takes its arguments."""
    x_BTHP, dt_BTH = operands.x, operands.dt
    heads, groups = x_BTHP.shape[2], operands.B.shape[2]
    B_BTHN, C_BTHN = (t.repeat_interleave(heads // groups, dim=2).to(x_BTHP.dtype) for t in (operands.B, operands.C))
    y_BTHP, state_BHNP = kernel(
        q=C_BTHN,
        k=B_BTHN,
        v=(x_BTHP * dt_BTH[..., None]).to(x_BTHP.dtype),
        g=dt_BTH * operands.A,
        scale=1.0,
        initial_state=None if state_BHPN is None else state_BHPN.mT.contiguous(),
        output_final_state=True,
    )
    return y_BTHP.to(torch.promote_types(dt_BTH.dtype, torch.float32)), state_BHNP.mT
