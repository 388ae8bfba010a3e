"""Causal self-attention with grouped queries (GQA, arXiv 2305.13245) and partial rotary positions.

    softmax(Q K^T / sqrt(K)) V over the keys that a query sees: the tokens of its document up to itself; with a window only the last
    `window` of them and itself, and the first `always_visible` (Longformer, arXiv 2004.05150; StreamingLLM, arXiv 2309.17453)

`AttentionCore` has no projections: `Attention` puts it between `qkv` and `out`, other layer types use it too. A layer may use the keys
and values of an earlier one (`LayerSpec.kv_from`; cross-layer sharing, arXiv 2405.12981): it projects and rotates only its queries.

The fused projection `qkv` is group-major: KV group by KV group, rows [q_1 .. q_n k v]. Any tensor-parallel
shard of whole groups is then one contiguous range of rows, and the module finds the number of groups it
holds from the width it gets.

Shapes: B batch, T sequence, S keys, D hidden, H heads, G KV groups, R = H/G queries of a group, N = R + 1 (a group's queries and key;
R without a key), K head dim of queries and keys, V head dim of values.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from megatron_lite.models import rope
from megatron_lite.models.attention_kernel import attend
from megatron_lite.models.attention_mask import Visibility
from megatron_lite.models.cache import KeyValue, KeyValueCache
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.context import LayerContext
from megatron_lite.models.linear import Linear
from megatron_lite.models.norm import NORMS
from megatron_lite.models.pattern import LayerSpec


class AttentionCore(nn.Module):
    """From projected queries, keys and values to the heads' outputs: norms, rotation, cache, sharing, mask, kernel."""

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.shares, self.uses_others, self.kv_window = spec.shares, spec.kv_from is not None, spec.kv_window
        self.visibility = Visibility(spec.window, config.attention.always_visible)
        self.queries = config.attention.heads // config.attention.kv_heads
        self.head_dim, self.value_head_dim = config.head_dim, config.value_head_dim
        self.rotary = rope.Rotary(config)
        make_norm = NORMS[config.norm] if config.attention.qk_norm else None
        self.q_norm = None if make_norm is None else make_norm(self.head_dim, config.norm_eps)
        self.k_norm = None if make_norm is None or self.uses_others else make_norm(self.head_dim, config.norm_eps)

    @property
    def sizes(self) -> list[int]:
        """Rows of one KV group in the fused projection: queries and key, value."""
        keys = 0 if self.uses_others else 1
        return [(self.queries + keys) * self.head_dim, keys * self.value_head_dim]

    def forward(self, qk_BTGX: Tensor, value_BTGV: Tensor, context: LayerContext) -> tuple[Tensor, KeyValue | None]:
        """((B, T, H V), keys and values for other layers or None). X = N K; V = 0 where another layer's are used."""
        qk_BTGNK = self._normed(qk_BTGX.unflatten(-1, (-1, self.head_dim)))
        if self.rotary.dim:
            dtype = torch.promote_types(qk_BTGX.dtype, torch.float32)  # bf16 has too few digits for angles
            cos, sin = context.shared(("rotary", dtype), partial(self.rotary.tables, context.positions_BT, dtype=dtype))
            qk_BTGNK = rope.apply_rotary(qk_BTGNK, cos, sin)  # queries and keys in one go
        if self.uses_others:
            assert context.kv is not None, "the decoder hands on the keys of the layer that the spec names"
            query, kv = qk_BTGNK, context.kv
        else:
            query, key = qk_BTGNK.split([self.queries, 1], dim=3)
            kv = KeyValue(key.squeeze(3).transpose(1, 2), value_BTGV.transpose(1, 2))
            if self.shares:
                kv = self.shared(kv, context)
            if isinstance(context.cache, KeyValueCache):
                kv = context.cache.append(kv.key_BGSK, kv.value_BGSV, context.positions_BT)
        y_BHTV = self.attend(query.flatten(2, 3).transpose(1, 2), kv, context)
        return y_BHTV.transpose(1, 2).flatten(2), kv if self.shares else None

    def _normed(self, qk_BTGNK: Tensor) -> Tensor:
        if self.q_norm is None:
            return qk_BTGNK
        if self.k_norm is None:
            return self.q_norm(qk_BTGNK)
        query, key = qk_BTGNK.split([self.queries, 1], dim=3)
        return torch.cat([self.q_norm(query), self.k_norm(key)], dim=3)

    def shared(self, kv: KeyValue, context: LayerContext) -> KeyValue:
        """Keys and values as this layer and those that share them use them. What a sequence that is cut over ranks replaces."""
        # views would lose the hooks by which FSDP2 learns of their gradients
        return KeyValue(kv.key_BGSK.contiguous(), kv.value_BGSV.contiguous())

    def attend(self, query_BHTK: Tensor, kv: KeyValue, context: LayerContext) -> Tensor:
        """(B, H, T, V). What a sequence that is cut over ranks replaces."""
        return attend(query_BHTK, kv, context, self.visibility)


class Attention(nn.Module):
    """The heads' outputs concatenated and projected back to D."""

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.core = AttentionCore(config, spec)
        width, heads = config.attention.kv_heads * sum(self.core.sizes), config.attention.heads
        bias = config.linear_bias or config.attention.qkv_bias
        self.qkv = Linear(config.hidden_size, width, init_std=config.init_std, bias=bias)
        self.out = Linear(
            heads * config.value_head_dim, config.hidden_size, init_std=config.output_init_std, bias=config.linear_bias
        )

    def forward(self, x_BTD: Tensor, context: LayerContext) -> tuple[Tensor, KeyValue | None]:
        """((B, T, D), keys and values for other layers or None)."""
        grouped_BTGX = self.qkv(x_BTD).unflatten(-1, (-1, sum(self.core.sizes)))
        # split, not slices: its backward is one concatenation, that of every slice a whole tensor of zeros.
        qk, value = grouped_BTGX.split(self.core.sizes, dim=3)
        y_BTX, kv = self.core(qk, value, context)
        return self.out(y_BTX), kv


def keys_cache(config: ModelConfig, spec: LayerSpec, capacity: int) -> KeyValueCache | None:
    """The cache of one attention layer; None for one that uses another layer's keys and values."""
    if spec.kv_from is not None:
        return None
    return KeyValueCache(capacity, window=spec.kv_window, always_visible=config.attention.always_visible)


def score_flops(config: ModelConfig, spec: LayerSpec, seq_len: int) -> float:
    """Training FLOPs of a token in Q K^T and the weighted sum of values: 6 H (K + V) for each key, which are as many as the sequence
    has, not halved for causality; with a window at most those that a query sees."""
    keys = seq_len
    if spec.window is not None:
        keys = min(seq_len, config.attention.always_visible + spec.window + 1)
    return 6.0 * config.attention.heads * (config.head_dim + config.value_head_dim) * keys


def check(config: ModelConfig) -> None:
    """Raises ValueError naming the key of `config.attention` or `config.rope` that an attention layer cannot have."""
    attention = config.attention
    for key in ("heads", "kv_heads"):
        if getattr(attention, key) < 1:
            raise ValueError(f"model.attention.{key}={getattr(attention, key)} must be at least 1")
    for key, default in (("head_dim", "hidden_size/heads"), ("value_head_dim", "head_dim"), ("window", "no window")):
        size = getattr(attention, key)
        if size is not None and size < 1:
            raise ValueError(f"model.attention.{key}={size} must be at least 1, or null for {default}")
    if attention.head_dim is None and config.hidden_size % attention.heads:
        raise ValueError(
            f"model.hidden_size={config.hidden_size} does not divide by model.attention.heads={attention.heads}; "
            "change one of them or set model.attention.head_dim"
        )
    if attention.heads % attention.kv_heads:
        raise ValueError(
            f"model.attention.heads={attention.heads} does not divide by model.attention.kv_heads="
            f"{attention.kv_heads}; every group of query heads shares one key-value head"
        )
    rope.check(config)
    if attention.always_visible < 0:
        raise ValueError(f"model.attention.always_visible={attention.always_visible} must not be negative")
    for key in ("always_visible", "global_layers"):
        if attention.window is None and getattr(attention, key):
            raise ValueError(
                f"model.attention.{key}={getattr(attention, key)} has no effect without model.attention.window; set that, or "
                f"drop model.attention.{key}"
            )
