"""Causal self-attention with grouped queries (GQA, arXiv 2305.13245) and partial rotary positions.

The fused projection `qkv` is group-major: KV group by KV group, rows [q_1 .. q_n k v]. Any tensor-parallel
shard of whole groups is then one contiguous range of rows, and the module finds the number of groups it
holds from the width it gets.

Shapes: B batch, T sequence, S keys, D hidden, H heads, G KV groups, N = H/G + 2 (a group's queries, key and
value), K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_lite.models import rope
from megatron_lite.models.attention_kernel import attention_kernel
from megatron_lite.models.cache import KeyValueCache
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.context import LayerContext
from megatron_lite.models.linear import Linear
from megatron_lite.models.norm import NORMS


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(K)) V, heads concatenated and projected back to D."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, kv_heads = config.attention.heads, config.attention.kv_heads
        self.head_dim = config.head_dim
        self.queries_per_group = heads // kv_heads
        self.rotary = rope.Rotary(config)
        width = (heads + 2 * kv_heads) * self.head_dim
        bias = config.linear_bias or config.attention.qkv_bias
        self.qkv = Linear(config.hidden_size, width, init_std=config.init_std, bias=bias)
        make_norm = NORMS[config.norm] if config.attention.qk_norm else None
        self.q_norm = None if make_norm is None else make_norm(self.head_dim, config.norm_eps)
        self.k_norm = None if make_norm is None else make_norm(self.head_dim, config.norm_eps)
        self.out = Linear(
            heads * self.head_dim, config.hidden_size, init_std=config.output_init_std, bias=config.linear_bias
        )

    def forward(self, x_BTD: Tensor, context: LayerContext) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        qkv_BTGNK = self.qkv(x_BTD).unflatten(-1, (-1, self.queries_per_group + 2, self.head_dim))
        length = qkv_BTGNK.shape[1]
        # split, not slices: its backward is one concatenation, that of every slice a whole tensor of zeros.
        qk, value = qkv_BTGNK.split([self.queries_per_group + 1, 1], dim=3)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = qk.split([self.queries_per_group, 1], dim=3)
            qk = torch.cat([self.q_norm(query), self.k_norm(key)], dim=3)
        if self.rotary.dim:
            dtype = torch.promote_types(x_BTD.dtype, torch.float32)  # bf16 has too few digits for angles
            cos, sin = self.rotary.tables(context.positions_BT, dtype=dtype)
            qk = rope.apply_rotary(qk, cos, sin)  # queries and keys in one go
        query, key = qk.split([self.queries_per_group, 1], dim=3)
        query_BHTK = query.flatten(2, 3).transpose(1, 2)
        key_BGSK, value_BGSK = key.squeeze(3).transpose(1, 2), value.squeeze(3).transpose(1, 2)
        if isinstance(context.cache, KeyValueCache):
            key_BGSK, value_BGSK = context.cache.append(key_BGSK, value_BGSK)
        mask = attention_mask(context, keys=key_BGSK.shape[2])
        kernel = attention_kernel(query_BHTK.device.type, query_BHTK.dtype, masked=mask is not None)
        # Without a mask a single query is the newest token and sees everything; a causal mask would align it with the first key.
        is_causal = mask is None and length > 1
        y_BHTK = kernel(query_BHTK, key_BGSK, value_BGSK, mask=mask, is_causal=is_causal)
        return self.out(y_BHTK.transpose(1, 2).flatten(2))


def attention_mask(context: LayerContext, *, keys: int) -> Tensor | None:
    """(B or 1, 1, T, S) bool, True = attend, for S = `keys`. None: causal, or a single query that sees all keys.

    A token sees the tokens of its document up to itself; positions rise within a document, so they say what comes before.
    """
    positions_BT = context.positions_BT
    if context.documents_BT is not None:
        documents_BT, positions_BT = context.documents_BT.int(), positions_BT.int()  # half as many bytes to compare
        mask_BTS = documents_BT[:, :, None] == documents_BT[:, None, :]
        mask_BTS &= positions_BT[:, :, None] >= positions_BT[:, None, :]
        return mask_BTS[:, None]
    keys_BS = torch.arange(keys, device=positions_BT.device)[None]
    if context.starts_B is not None:
        keys_BS = keys_BS - context.starts_B[:, None]
        return (keys_BS[:, None, None] >= 0) & (keys_BS[:, None, None] <= positions_BT[:, None, :, None])
    if positions_BT.shape[1] in (1, keys):
        return None
    return positions_BT[:, None, :, None] >= keys_BS[:, None, None]


def score_flops(config: ModelConfig, seq_len: int) -> float:
    """Training FLOPs of a token in Q K^T and the weighted sum of values, in full, not halved for causality."""
    return 12.0 * config.attention.heads * config.head_dim * seq_len


def check(config: ModelConfig) -> None:
    """Raises ValueError naming the key of `config.attention` or `config.rope` that an attention layer cannot have."""
    attention = config.attention
    for key, size in (("heads", attention.heads), ("kv_heads", attention.kv_heads)):
        if size < 1:
            raise ValueError(f"model.attention.{key}={size} must be at least 1")
    if attention.head_dim is not None and attention.head_dim < 1:
        raise ValueError(
            f"model.attention.head_dim={attention.head_dim} must be at least 1, or null for hidden_size/heads"
        )
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
    if attention.value_head_dim not in (None, config.head_dim):
        raise ValueError(
            f"model.attention.value_head_dim={attention.value_head_dim} is not built yet; set it to null, which "
            f"means the head dim of queries and keys ({config.head_dim})"
        )
