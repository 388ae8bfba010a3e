"""State-space scans on the meta device: marked, so that their time is told apart, and by a kernel where a GPU would run one.

Without kernels a scan is the plain PyTorch of `models/ssd.py` and `models/selective_scan.py`, operator by operator. With them it is what
`models/ssd_kernel.py` and `models/selective_scan_kernel.py` hand to the libraries, and then these kernels as the libraries launch them:

    flash-linear-attention   chunks of 64 tokens. Forward writes the states that enter them in bf16 and reads them again; backward
    (Mamba-2)                writes them in fp32, and their gradients too, and reads these twice. Products by tensor cores.
    mamba-ssm (Mamba-1)      one kernel for each pass, which reads and writes tokens x channels and keeps the states of all tokens in
                             registers; two numbers a state are kept for every 2,048 tokens. fp32, by ordinary cores.

Read from chunk_simple_gla (fla/ops/simple_gla/chunk.py at 07784bc) and SelectiveScanFn (mamba_ssm/ops/selective_scan_interface.py at
01887ed), not measured.

Shapes: B batch, T sequence, H heads, P head dim, N state, K chunks; C channels of Mamba-1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.models import selective_scan_kernel, ssd_kernel
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.hymba import SelectiveStateSpace
from megatron_lite.models.mamba import StateSpace
from megatron_lite.models.scan import Operands, Past
from megatron_lite.models.selective_scan import selective_scan
from megatron_lite.models.ssd import ssd
from megatron_lite.parallel.reclass import reclass

CHUNK, KEPT_EVERY = 64, 2048  # tokens
# Of Mamba-1, for each number of the state: 7 FLOPs forward (`mamba.scan_flops`) and 21 backward, which computes the states again; and an
# exponential in each, for which a GPU has 16 units where it has 256 FLOPs a cycle.
SELECTIVE_FLOPS = (7 + 16, 21 + 16)

Scan = Callable[[Operands, Past], tuple[Tensor, Tensor]]


class PlannedScan(nn.Module):
    """Mixed in before a state-space module's class. run: the scan itself."""

    run: Scan

    def scan(self, operands: Operands, past: Past) -> tuple[Tensor, Tensor]:
        """See `ssd` and `selective_scan`."""
        inside = Operands(*_Mark.apply(True, *vars(operands).values()))
        y, state = self.run(inside, past)
        return _Mark.apply(False, y)[0], state


def plan_scans(decoder: Decoder, *, kernels: bool) -> None:
    """Mark every scan, and with `kernels` give those that a kernel can compute to it, in place. Comes before `parallelize`."""
    for module in decoder.modules():
        if isinstance(module, StateSpace):
            reclass(module, PlannedScan, run=_mamba2_by_kernel if kernels else ssd)
        elif isinstance(module, SelectiveStateSpace):
            reclass(module, PlannedScan, run=_mamba1_by_kernel if kernels else selective_scan)


def _mamba2_by_kernel(operands: Operands, past: Past) -> tuple[Tensor, Tensor]:
    if not ssd_kernel.kernel_fits("cuda", operands.x.dtype, past):
        return ssd(operands, past)
    return ssd_kernel.by_kernel(_gated_linear_attention, operands, past.state)


def _mamba1_by_kernel(operands: Operands, past: Past) -> tuple[Tensor, Tensor]:
    if not selective_scan_kernel.kernel_fits("cuda", operands.dt.dtype, past, states=operands.A.shape[1]):
        return selective_scan(operands, past)
    return selective_scan_kernel.by_kernel(_selective_scan, operands)


# ------------------------------------------------------------------ operators that a recorder knows


@torch.library.custom_op("mlite::planned_mark", mutates_args=())
def mark(like: Tensor, begins: bool) -> Tensor:
    """A scan, or its backward, begins or ends here."""
    raise NotImplementedError("a mark is for the meta device")


@mark.register_fake
def _(like: Tensor, begins: bool) -> Tensor:
    return like.new_empty(0)


@torch.library.custom_op("mlite::planned_scan", mutates_args=())
def launch(reads: Sequence[Tensor], writes: Sequence[Tensor], flops: float) -> Tensor:
    """One kernel of a scan, which computes in the dtype of the first tensor that it reads."""
    raise NotImplementedError("a planned scan is for the meta device")


@launch.register_fake
def _(reads: Sequence[Tensor], writes: Sequence[Tensor], flops: float) -> Tensor:
    return reads[0].new_empty(0)


MARK, LAUNCH = torch.ops.mlite.planned_mark, torch.ops.mlite.planned_scan


class _Mark(torch.autograd.Function):
    """The identity. In backward the end comes first."""

    @staticmethod
    def forward(ctx: Any, begins: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.begins = begins
        ctx.set_materialize_grads(False)
        mark(tensors[0], begins)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        mark(next(gradient for gradient in gradients if gradient is not None), not ctx.begins)
        return None, *gradients


# ------------------------------------------------------------------ the kernels


def _gated_linear_attention(
    *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None, **_: Any
) -> Any:
    return _GatedLinearAttention.apply(q, k, v, g, initial_state)


class _GatedLinearAttention(torch.autograd.Function):
    """q, k (B, T, H, N), v (B, T, H, P), g (B, T, H), state (B, H, N, P) or None -> (o, the last state)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        states, tokens, last = _states(k, v, k.dtype), _Tokens(k, v), _states(k[:, :1], v, torch.float32)[:, 0]
        sums, o = torch.empty_like(g), torch.empty_like(v)
        launch([g], [sums], 0.0)
        launch([k, v, sums], [states, last], tokens.of_states)
        launch([q, k, v, sums, states], [o], tokens.scores(1, 1) + tokens.of_states)
        ctx.save_for_backward(q, k, v, sums)
        ctx.continues = state is not None
        return o, last

    @staticmethod
    def backward(ctx: Any, do: Tensor, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sums = ctx.saved_tensors
        states, dstates, tokens = _states(k, v, torch.float32), _states(k, v, torch.float32), _Tokens(k, v)
        launch([k, v, sums], [states], tokens.of_states)
        launch([q, do, sums], [dstates], tokens.of_states)
        dq, dk, dsums = torch.empty_like(q), torch.empty_like(k), torch.empty_like(sums)
        launch([q, k, v, sums, states, do, dstates], [dq, dk, dsums], tokens.scores(2, 1) + 2 * tokens.of_states)
        dv, dg = torch.empty_like(v), torch.empty_like(sums)
        launch([q, k, sums, do, dstates], [dv], tokens.scores(1, 1) + tokens.of_states)
        launch([dsums], [dg], 0.0)
        return dq, dk, dv, dg, dstates[:, 0] if ctx.continues else None


class _Tokens:
    """FLOPs of all tokens and heads of a scan."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.N, self.P = k.shape[-1], v.shape[-1]
        self.count = 2.0 * k.shape[0] * k.shape[1] * k.shape[2]

    @property
    def of_states(self) -> float:
        """One product with a state, N x P."""
        return self.count * self.N * self.P

    def scores(self, with_states: int, with_values: int) -> float:
        """Products of a chunk's scores: so many with vectors of N numbers, so many with P."""
        return self.count * CHUNK * (with_states * self.N + with_values * self.P)


def _states(k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, K, H, N, P)."""
    batch, length, heads, states = k.shape
    return k.new_empty(batch, ceil(length / CHUNK), heads, states, v.shape[-1], dtype=dtype)


def _selective_scan(x_BCT: Tensor, dt_BCT: Tensor, A_CN: Tensor, B_BNT: Tensor, C_BNT: Tensor, **_: Any) -> Any:
    return _SelectiveScan.apply(x_BCT, dt_BCT, A_CN, B_BNT, C_BNT)


class _SelectiveScan(torch.autograd.Function):
    """x, dt (B, C, T), A (C, N), B, C (B, N, T) -> (y (B, C, T), the last state (B, C, N))."""

    @staticmethod
    def forward(ctx: Any, *operands: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        x_BCT, _, A_CN, _, _ = operands
        (batch, channels, length), states = x_BCT.shape, A_CN.shape[1]
        y_BCT, kept = torch.empty_like(x_BCT), x_BCT.new_empty(batch, channels, ceil(length / KEPT_EVERY), 2 * states)
        launch(operands, [y_BCT, kept], SELECTIVE_FLOPS[0] * float(x_BCT.numel()) * states)
        ctx.save_for_backward(*operands, kept)
        return y_BCT, kept[:, :, -1, 1::2]

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlast: Tensor | None) -> tuple[Tensor, ...]:
        *operands, kept = ctx.saved_tensors
        gradients = [torch.empty_like(operand) for operand in operands]
        flops = SELECTIVE_FLOPS[1] * float(dy.numel()) * operands[2].shape[1]
        launch([*operands, dy, kept], gradients, flops)
        return tuple(gradients)
