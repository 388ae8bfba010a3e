"""The Mamba-2 mixer (Dao and Gu, arXiv 2405.21060): a state-space layer, whose memory does not grow with the sequence.

    z, x, B, C, dt = in_proj(input)                     gate, values, what is written to and read from the state, time step
    x, B, C        = silu(convolution of the last 4)    causal, each channel alone
    dt             = softplus(dt + dt_bias)
    y              = SSD(x, dt, -exp(A_log), B, C) + D x        (`ssd.py`)
    output         = out_proj(RMSNorm(y silu(z)))       each group normalized alone

Heads share B and C by groups, as query heads share keys and values. The rows of `in_proj` are group-major, [z x B C dt] of one group
after the other, and so are the convolution's channels [x B C], heads and norm: a tensor-parallel shard of whole groups is one
contiguous range of rows everywhere, and the module finds the number of groups it holds from the width that it gets. (In blocks of
128 rows for FP8 a group of Nemotron Nano 2 has 2 x 1280 + 2 x 128 = 22 x 128 rows before its 16 of dt: where blocks are cut group by
group, dt has one of its own.)

Convolution and scan take a state and return one, so that a later call can continue the sequence.

Shapes: B batch, T sequence, D hidden, G groups, R heads of a group, H = G R heads, P head dim, N state, K taps, W = G (R P + 2 N)
channels of the convolution (`conv.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.models import ssd_kernel
from megatron_lite.models.cache import LayerCache
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.context import LayerContext
from megatron_lite.models.conv import CausalConv
from megatron_lite.models.initialization import Constant, Distribution
from megatron_lite.models.linear import Linear
from megatron_lite.models.norm import at_least_float32
from megatron_lite.models.pattern import LayerSpec
from megatron_lite.models.scan import Operands, Past


class Mamba2(nn.Module):
    """Mixes along the sequence by a state of H P N numbers."""

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        mamba = config.mamba
        heads = mamba.heads // mamba.groups
        inner = heads * mamba.head_dim
        self.head_dim = mamba.head_dim
        self.gate_and_rest = [inner, inner + 2 * mamba.state, heads]  # of one group: z, (x, B, C), dt
        self.values_and_rest = [inner, mamba.state, mamba.state]  # of one group: x, B, C
        rows, channels = (mamba.groups * sum(sizes) for sizes in (self.gate_and_rest, self.values_and_rest))
        self.in_proj = Linear(config.hidden_size, rows, init_std=config.init_std, bias=config.linear_bias)
        self.conv = CausalConv(channels, mamba.conv)
        self.ssm = StateSpace(mamba.heads, mamba.dt_limits)
        self.norm = GatedGroupNorm(mamba.groups * inner, config.norm_eps)
        self.out_proj = Linear(
            mamba.groups * inner, config.hidden_size, init_std=config.output_init_std, bias=config.linear_bias
        )

    def forward(self, x_BTD: Tensor, context: LayerContext) -> tuple[Tensor, None]:
        """(B, T, D) -> ((B, T, D), None)."""
        cache = context.cache if isinstance(context.cache, StateCache) else StateCache()
        grouped_BTG = self.in_proj(x_BTD).unflatten(2, (-1, sum(self.gate_and_rest)))
        gate, mixed, dt = grouped_BTG.split(self.gate_and_rest, dim=3)
        mixed_BTW, cache.conv = self.conv(mixed.flatten(2), cache.conv, context.documents_BT, prefix=context.prefix)
        grouped_BTG = F.silu(mixed_BTW).unflatten(2, (-1, sum(self.values_and_rest)))
        values, B_BTGN, C_BTGN = grouped_BTG.split(self.values_and_rest, dim=3)
        x_BTHP = values.flatten(2).unflatten(2, (-1, self.head_dim))
        y_BTHP, cache.ssm = self.ssm(
            x_BTHP,
            dt.flatten(2),
            B_BTGN,
            C_BTGN,
            Past(cache.ssm, context.documents_BT, context.prefix),
        )
        return self.out_proj(self.norm(y_BTHP.flatten(2).view_as(gate), gate)), None


@dataclass
class StateCache(LayerCache):
    """The state of a state-space layer: the last K - 1 inputs of the convolution (B, K - 1, W), the scan's state (B, H, P, N)."""

    conv: Tensor | None = None
    ssm: Tensor | None = None

    def nbytes(self) -> int:
        """See `LayerCache`."""
        return sum(tensor.nbytes for tensor in (self.conv, self.ssm) if tensor is not None)

    @classmethod
    def batch(cls, caches: Sequence[LayerCache], capacity: int) -> StateCache:
        """See `LayerCache`."""
        conv, ssm = (torch.cat([getattr(cache, name) for cache in caches]) for name in ("conv", "ssm"))
        return cls(conv, ssm)


class StateSpace(nn.Module):
    """The scan with its own parameters `A_log`, `dt_bias` and `D` (H,): an error in them would grow with the length of the sequence."""

    compute_in_fp32 = True
    kinds: ClassVar[dict[str, str]] = {"A_log": "state", "dt_bias": "state", "D": "state"}

    def __init__(self, heads: int, dt_limits: list[float] | None) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.dt_limits = None if dt_limits is None else tuple(dt_limits)

    def forward(
        self, x_BTHP: Tensor, dt_BTH: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, past: Past
    ) -> tuple[Tensor, Tensor]:
        """(y (B, T, H, P) in x's dtype, state after it (B, H, P, N) in float32 at least and without a gradient).

        dt: as projected, without bias and softplus.
        """
        dt_BTH = F.softplus(at_least_float32(dt_BTH) + at_least_float32(self.dt_bias))
        if self.dt_limits is not None:
            dt_BTH = dt_BTH.clamp(*self.dt_limits)
        A_H = -at_least_float32(self.A_log).exp()
        y_BTHP, state_BHPN = self.scan(Operands(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN), past)
        # The state is for a cache. FSDP2 would put a backward hook on it, and warns because it is a view.
        return (y_BTHP + at_least_float32(self.D)[:, None] * x_BTHP).to(x_BTHP.dtype), state_BHPN.detach()

    scan = staticmethod(ssd_kernel.scan)  # what a sequence that is cut over ranks replaces

    def initial(self) -> dict[str, Distribution]:
        """As Megatron-LM: A uniform in [1, 16], first time steps log-uniform in [0.001, 0.1], D one."""
        return {"A_log": LogOfUniform(1.0, 16.0), "dt_bias": TimeStepBias(1e-3, 0.1), "D": Constant(1.0)}


class GatedGroupNorm(nn.Module):
    """RMSNorm(y silu(z)) of each group alone, with gain `weight` (G R P,)."""

    kinds: ClassVar[dict[str, str]] = {"weight": "norm"}

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """(..., G, R P) twice -> (..., G R P) in y's dtype, computed in float32 at least."""
        gated = at_least_float32(y) * F.silu(at_least_float32(gate))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.eps)
        return (normed.flatten(-2) * at_least_float32(self.weight)).to(y.dtype)

    def initial(self) -> dict[str, Distribution]:
        """Identity gain."""
        return {"weight": Constant(1.0)}


@dataclass(frozen=True)
class LogOfUniform:
    """log(u), u uniform in [low, high)."""

    low: float
    high: float
    valid_rows: int | None = None

    def fill_(self, block: Tensor, generator: torch.Generator) -> None:
        """Fills one float64 CPU block in place."""
        block.uniform_(self.low, self.high, generator=generator).log_()


@dataclass(frozen=True)
class TimeStepBias:
    """The b with softplus(b) = dt, dt log-uniform in [low, high)."""

    low: float
    high: float
    valid_rows: int | None = None

    def fill_(self, block: Tensor, generator: torch.Generator) -> None:
        """Fills one float64 CPU block in place."""
        dt = block.uniform_(math.log(self.low), math.log(self.high), generator=generator).exp_()
        dt.add_(dt.neg().expm1().neg().log())


def scan_flops(config: ModelConfig, spec: LayerSpec, seq_len: int) -> float:
    """Training FLOPs of a token in the recurrence: 7 for each number of the state (Megatron-LM's count), and twice that backward."""
    return 3 * 7.0 * config.mamba.heads * config.mamba.head_dim * config.mamba.state


def check(config: ModelConfig) -> None:
    """Raises ValueError naming the key of `config.mamba` that such a layer cannot have."""
    mamba = config.mamba
    if mamba.version != 2:
        raise ValueError(
            f"model.mamba.version={mamba.version}, but layers 'M' of model.pattern are Mamba-2; set it to 2"
        )
    if mamba.dt_rank is not None:
        raise ValueError(f"model.mamba.dt_rank={mamba.dt_rank} belongs to Mamba-1 (layers 'H'); drop it")
    check_sizes(config)
    if mamba.heads % mamba.groups:
        raise ValueError(
            f"model.mamba.heads={mamba.heads} does not divide by model.mamba.groups={mamba.groups}; every group of heads "
            "shares B and C"
        )


def check_sizes(config: ModelConfig) -> None:
    """The part of `check` that both versions of Mamba share."""
    mamba = config.mamba
    for key in ("heads", "head_dim", "groups", "state", "conv"):
        if getattr(mamba, key) < 1:
            raise ValueError(f"model.mamba.{key}={getattr(mamba, key)} must be at least 1")
    if mamba.dt_limits is not None and not (len(mamba.dt_limits) == 2 and 0 <= mamba.dt_limits[0] < mamba.dt_limits[1]):
        raise ValueError(
            f"model.mamba.dt_limits={mamba.dt_limits} must be two numbers, 0 <= least < most (.inf: no upper limit), or null"
        )
