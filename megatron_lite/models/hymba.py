"""Hymba's mixer (Dong et al., arXiv 2411.13676): attention heads and Mamba-1 heads read one input side by side.

    q, k, v, x, z = in_proj(input)                      q and k of head dim K, v of head dim V; gate z
    a             = attention(q, k, v)                  `attention.py`: rotation, window, shared keys and values
    x             = silu(convolution of the last 4)     causal, each channel alone
    dt, B, C      = RMSNorm of each part of x_proj(x)   of low rank; what is written to and read from the state
    dt            = softplus(dt_proj(dt) + dt_bias)     a time step for each channel
    s             = (scan(x, dt, -exp(A_log), B, C) + D x) silu(z)                                   `selective_scan.py`
    output        = out_proj((RMSNorm(a) + RMSNorm(s)) / 2)

The paper writes b1 norm(a) + b2 norm(s): its vectors b1 and b2 are the gains of the two norms. Both branches are as wide as each
other, H V, and the two are added channel by channel.

The rows of `in_proj` are group-major: for each KV group [q_1 .. q_n k v x z], with as many channels of x and z as its heads have
values, so that a tensor-parallel shard of whole groups is one contiguous range of rows, and of channels, heads and norms. A layer
that uses another's keys and values has no rows k and v.

Shapes: B batch, T sequence, D hidden, G KV groups, H heads, V head dim of values, C = H V channels, L rank of the time steps, N state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.models import attention, mamba, selective_scan_kernel
from megatron_lite.models.attention import AttentionCore, keys_cache
from megatron_lite.models.cache import KeyValue, KeyValueCache, LayerCache
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.context import LayerContext
from megatron_lite.models.conv import CausalConv
from megatron_lite.models.initialization import Constant, Distribution
from megatron_lite.models.linear import Linear
from megatron_lite.models.mamba import StateCache, TimeStepBias
from megatron_lite.models.norm import RMSNorm, at_least_float32
from megatron_lite.models.pattern import LayerSpec
from megatron_lite.models.scan import Operands, Past


class Hymba(nn.Module):
    """Attention and state-space heads in parallel, averaged."""

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        sizes, groups = config.mamba, config.attention.kv_heads
        width = sizes.heads * sizes.head_dim
        assert sizes.dt_rank is not None, "check() asks for it"
        self.attention = AttentionCore(config, spec)
        self.sizes = [*self.attention.sizes, width // groups, width // groups]  # of one group: q and k, v, x, z
        self.low_rank = [sizes.dt_rank, sizes.state, sizes.state]
        rows = groups * sum(self.sizes)
        self.in_proj = Linear(config.hidden_size, rows, init_std=config.init_std, bias=config.linear_bias)
        self.conv = CausalConv(width, sizes.conv)
        self.select = Selection(width, self.low_rank, init_std=config.init_std, eps=config.norm_eps)
        # as wide as Mamba's uniform distribution within 1 / sqrt(L)
        self.dt_proj = Linear(sizes.dt_rank, width, init_std=(3 * sizes.dt_rank) ** -0.5)
        self.ssm = SelectiveStateSpace(width, sizes.state)
        self.attention_norm = RMSNorm(width, config.norm_eps)
        self.ssm_norm = RMSNorm(width, config.norm_eps)
        self.out_proj = Linear(width, config.hidden_size, init_std=config.output_init_std, bias=config.linear_bias)

    def forward(self, x_BTD: Tensor, context: LayerContext) -> tuple[Tensor, KeyValue | None]:
        """((B, T, D), keys and values for other layers or None)."""
        cache = context.cache if isinstance(context.cache, HymbaCache) else HymbaCache(None, StateCache())
        grouped_BTGX = self.in_proj(x_BTD).unflatten(2, (-1, sum(self.sizes)))
        # split, not slices: its backward is one concatenation, that of every slice a whole tensor of zeros
        qk, value, x, gate = grouped_BTGX.split(self.sizes, dim=3)
        attended_BTC, kv = self.attention(qk, value, replace(context, cache=cache.keys))
        x_BTC, cache.state.conv = self.conv(x.flatten(2), cache.state.conv, context.documents_BT, prefix=context.prefix)
        x_BTC = F.silu(x_BTC)
        dt_BTL, B_BTN, C_BTN = self.select(x_BTC).split(self.low_rank, dim=2)
        remembered_BTC, cache.state.ssm = self.ssm(
            x_BTC,
            self.dt_proj(dt_BTL),
            B_BTN,
            C_BTN,
            gate.flatten(2),
            Past(cache.state.ssm, context.documents_BT, context.prefix),
        )
        return self.out_proj((self.attention_norm(attended_BTC) + self.ssm_norm(remembered_BTC)) / 2), kv


class Selection(nn.Module):
    """x_proj and an RMSNorm on each of its parts: dt, B and C."""

    def __init__(self, width: int, parts: list[int], *, init_std: float, eps: float) -> None:
        super().__init__()
        self.parts = parts
        self.x_proj = Linear(width, sum(parts), init_std=init_std)
        self.dt_norm, self.B_norm, self.C_norm = (RMSNorm(part, eps) for part in parts)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, L + 2 N): dt, B, C."""
        dt, B, C = self.x_proj(x_BTC).split(self.parts, dim=-1)
        return torch.cat([self.dt_norm(dt), self.B_norm(B), self.C_norm(C)], dim=-1)


class SelectiveStateSpace(nn.Module):
    """The scan with its own parameters `A_log` (C, N), `dt_bias` and `D` (C,): an error in them would grow with the length of the
    sequence."""

    compute_in_fp32 = True
    kinds: ClassVar[dict[str, str]] = {"A_log": "state", "dt_bias": "state", "D": "state"}

    def __init__(self, channels: int, states: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(channels, states))
        self.dt_bias = nn.Parameter(torch.empty(channels))
        self.D = nn.Parameter(torch.empty(channels))

    def forward(
        self, x_BTC: Tensor, dt_BTC: Tensor, B_BTN: Tensor, C_BTN: Tensor, gate_BTC: Tensor, past: Past
    ) -> tuple[Tensor, Tensor]:
        """((scan + D x) silu(gate) (B, T, C) in x's dtype, state after it (B, C, N) in float32 at least).

        dt: as projected, without bias and softplus.
        """
        dt_BTC = F.softplus(at_least_float32(dt_BTC) + at_least_float32(self.dt_bias))
        A_CN = -at_least_float32(self.A_log).exp()
        y_BTC, state_BCN = self.scan(Operands(x_BTC, dt_BTC, A_CN, B_BTN, C_BTN), past)
        y_BTC = (y_BTC + at_least_float32(self.D) * x_BTC) * F.silu(at_least_float32(gate_BTC))
        return y_BTC.to(x_BTC.dtype), state_BCN

    scan = staticmethod(selective_scan_kernel.scan)  # what a sequence that is cut over ranks replaces

    def initial(self) -> dict[str, Distribution]:
        """As Mamba-1: A = -1 .. -N in every channel, first time steps log-uniform in [0.001, 0.1], D one."""
        return {"A_log": LogOfCount(), "dt_bias": TimeStepBias(1e-3, 0.1), "D": Constant(1.0)}


@dataclass(frozen=True)
class LogOfCount:
    """log(1), log(2), .. log(N) in every row."""

    valid_rows: int | None = None

    def fill_(self, block: Tensor, generator: torch.Generator) -> None:
        """Fills one float64 CPU block in place."""
        block.copy_(torch.arange(1, block.shape[1] + 1, dtype=block.dtype).log())


@dataclass
class HymbaCache(LayerCache):
    """Keys and values (None: another layer keeps them) and the state of the other branch."""

    keys: KeyValueCache | None
    state: StateCache

    def nbytes(self) -> int:
        """See `LayerCache`."""
        return self.state.nbytes() + (0 if self.keys is None else self.keys.nbytes())

    @classmethod
    def batch(cls, caches: Sequence[LayerCache], capacity: int) -> HymbaCache:
        """See `LayerCache`."""
        rows = [cache for cache in caches if isinstance(cache, cls)]
        keys = [row.keys for row in rows if row.keys is not None]
        batched = KeyValueCache.batch(keys, capacity) if keys else None
        return cls(batched, StateCache.batch([row.state for row in rows], capacity))


def cache(config: ModelConfig, spec: LayerSpec, capacity: int) -> HymbaCache:
    """An empty cache for `capacity` tokens."""
    return HymbaCache(keys_cache(config, spec, capacity), StateCache())


def flops(config: ModelConfig, spec: LayerSpec, seq_len: int) -> float:
    """Training FLOPs of a token in attention's scores and in the recurrence."""
    return attention.score_flops(config, spec, seq_len) + mamba.scan_flops(config, spec, seq_len)


def check(config: ModelConfig) -> None:
    """Raises ValueError naming the key that such a layer cannot have."""
    attention.check(config)
    mamba.check_sizes(config)
    sizes, heads = config.mamba, config.attention
    if sizes.version != 1:
        raise ValueError(
            f"model.mamba.version={sizes.version}, but layers 'H' of model.pattern are Mamba-1; set it to 1"
        )
    if heads.qkv_bias:
        raise ValueError(
            "model.attention.qkv_bias=True is not known in layers 'H', whose queries, keys and values have no biases"
        )
    if sizes.dt_rank is None or sizes.dt_rank < 1:
        raise ValueError(f"model.mamba.dt_rank={sizes.dt_rank} must be at least 1 in layers 'H'")
    for key, only in (("groups", 1), ("dt_limits", None)):
        if getattr(sizes, key) != only:
            raise ValueError(
                f"model.mamba.{key}={getattr(sizes, key)} belongs to Mamba-2 (layers 'M'); set it to "
                f"{'null' if only is None else only}"
            )
    if sizes.heads * sizes.head_dim != heads.heads * config.value_head_dim:
        raise ValueError(
            f"model.mamba.heads={sizes.heads} x model.mamba.head_dim={sizes.head_dim} must equal model.attention.heads="
            f"{heads.heads} x model.attention.value_head_dim={config.value_head_dim}: the two branches are averaged"
        )
