"""Which kernel computes softmax(Q K^T / sqrt(K)) V.

    device  dtype        mask     kernel                keys and values
    cuda    bf16, fp16   none     flash                 one head a group; with another head dim for values: memory-efficient
    cuda    bf16, fp16   given    memory-efficient      repeated for every query head
    cuda    fp32         any      memory-efficient      repeated for every query head
    cuda    fp64         any      math                  one head a group
    cuda    16, 32 bit   window   FlexAttention         one head a group; blocks that no query sees are left out
    others  any          window   torch's choice        of a band of keys at a time
    others  any          any      torch's choice        one head a group

`F.scaled_dot_product_attention` would choose by itself, and where nothing else fits fall to the math kernel without a word, which
keeps T x T scores of every head: flash takes neither masks nor fp32, memory-efficient takes no grouped heads. So the kernel is named,
and one that cannot run raises RuntimeError. Flash and memory-efficient have a deterministic backward pass, which
`torch.use_deterministic_algorithms` switches on, so the choice does not depend on it.

A window that hides keys makes attention linear in T: FlexAttention skips blocks (it has no backward pass on a CPU), elsewhere a block
of queries is given the keys that its window reaches, and those that are always visible (`banded`).

Shapes: B batch, T queries, S keys, H heads, G KV groups, K head dim of queries and keys, V that of values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from megatron_lite.models.attention_mask import Visibility, dense_mask, mask_function, training_mask
from megatron_lite.models.cache import KeyValue
from megatron_lite.models.context import LayerContext


@dataclass(frozen=True)
class AttentionKernel:
    """backend: None leaves the choice to torch. repeats: keys and values are given to it once for every query head."""

    name: str
    backend: SDPBackend | None = None
    repeats: bool = False

    def __call__(
        self, query_BHTK: Tensor, key_BGSK: Tensor, value_BGSV: Tensor, *, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """(B, H, T, V). mask: (B or 1, 1, T, S) bool, True = attend, or added to the scores. Raises RuntimeError if the kernel cannot
        run."""
        queries = query_BHTK.shape[1] // key_BGSK.shape[1]
        if self.repeats and queries > 1:
            key_BGSK, value_BGSV = (x.repeat_interleave(queries, dim=1) for x in (key_BGSK, value_BGSV))
        with sdpa_kernel(self.backend) if self.backend is not None else nullcontext():
            return F.scaled_dot_product_attention(
                query_BHTK,
                key_BGSK,
                value_BGSV,
                attn_mask=mask,
                is_causal=is_causal,
                # On CPU as fast as any way of repeating the keys and values by hand (tried, both passes).
                enable_gqa=queries > 1 and not self.repeats,
            )


ANY = AttentionKernel("torch's choice")
FLASH = AttentionKernel("flash", SDPBackend.FLASH_ATTENTION)
EFFICIENT = AttentionKernel("memory-efficient", SDPBackend.EFFICIENT_ATTENTION, repeats=True)
MATH = AttentionKernel("math", SDPBackend.MATH)


def attention_kernel(
    device_type: str, dtype: torch.dtype, *, masked: bool, same_head_dims: bool = True
) -> AttentionKernel:
    """The kernel for tensors of `dtype` on such a device, with or without a mask: the table above, without windows."""
    if device_type != "cuda":
        return ANY
    if dtype is torch.float64:
        return MATH
    return EFFICIENT if masked or dtype is torch.float32 or not same_head_dims else FLASH


def attend(query_BHTK: Tensor, kv: KeyValue, context: LayerContext, visibility: Visibility) -> Tensor:
    """(B, H, T, V): softmax(Q K^T / sqrt(K)) V over the keys that each query sees."""
    device, dtype, length = query_BHTK.device.type, query_BHTK.dtype, query_BHTK.shape[2]
    of_the_same_tokens = kv.positions_BS is None and kv.key_BGSK.shape[2] == length
    if of_the_same_tokens and visibility.hides_some_of(length):
        if device == "cuda" and dtype is not torch.float64:
            return with_blocks(query_BHTK, kv, context, visibility)
        if context.documents_BT is None or visibility.always_visible == context.prefix:
            return banded(query_BHTK, kv, context, visibility)
    if context.documents_BT is None:
        mask = dense_mask(context, kv, visibility)
    else:
        mask = context.shared(("dense", visibility, dtype), partial(_document_mask, context, kv, visibility, dtype))
    same = query_BHTK.shape[-1] == kv.value_BGSV.shape[-1]
    kernel = attention_kernel(device, dtype, masked=mask is not None, same_head_dims=same)
    # Without a mask a single query is the newest token and sees everything; a causal mask would align it with the first key.
    return kernel(query_BHTK, kv.key_BGSK, kv.value_BGSV, mask=mask, is_causal=mask is None and length > 1)


def _document_mask(context: LayerContext, kv: KeyValue, visibility: Visibility, dtype: torch.dtype) -> Tensor:
    seen = dense_mask(context, kv, visibility)
    assert seen is not None, "documents have a mask"
    return additive(seen, dtype)


def banded(query_BHTK: Tensor, kv: KeyValue, context: LayerContext, visibility: Visibility) -> Tensor:
    """`attend` for a window, block of queries by block: T x (window + block + always visible) scores.

    Within a document positions are as far apart as indices, so a window reaches no further back than `window` indices. What is
    always visible must be the first tokens of the row, and with several documents the prefix and nothing else.
    """
    assert visibility.window is not None, "without a window there is no band"
    length, first, dtype = query_BHTK.shape[2], visibility.always_visible, query_BHTK.dtype
    block = max(64, visibility.window // 2)
    outputs = []
    for start in range(0, length, block):
        queries = slice(start, min(start + block, length))
        low = max(first, start - visibility.window)
        key, value = (
            x[:, :, : queries.stop]
            if low == first
            else torch.cat([x[:, :, :first], x[:, :, low : queries.stop]], dim=2)
            for x in (kv.key_BGSK, kv.value_BGSV)
        )
        key_of_mask = "band", visibility, queries.start, low, length, dtype
        mask = context.shared(key_of_mask, partial(band_mask, context, visibility, queries, low, dtype))
        kernel = attention_kernel(query_BHTK.device.type, dtype, masked=True)
        outputs.append(kernel(query_BHTK[:, :, queries], key, value, mask=mask, is_causal=False))
    return torch.cat(outputs, dim=2)


def band_mask(context: LayerContext, visibility: Visibility, queries: slice, low: int, dtype: torch.dtype) -> Tensor:
    """(B or 1, 1, queries, keys) for the keys that are always visible and those from `low` to the last query; see `additive`."""
    index_T = torch.arange(queries.stop, device=context.positions_BT.device)
    keys = torch.cat([index_T[: min(visibility.always_visible, low)], index_T[low:]])
    seen = training_mask(
        context.documents_BT, context.positions_BT, visibility, prefix=context.prefix, queries=queries, keys=keys
    )
    return additive(seen, dtype)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, else minus infinity: what the kernels make of a mask of bools, each time and for every layer."""
    return torch.zeros((), dtype=dtype, device=seen.device).where(seen, float("-inf"))


def with_blocks(query_BHTK: Tensor, kv: KeyValue, context: LayerContext, visibility: Visibility) -> Tensor:
    """`attend` by FlexAttention, which skips the blocks of keys that no query of a block sees. On a GPU it must be compiled."""
    batch, _, length, _ = query_BHTK.shape
    rows = batch if context.documents_BT is not None or len(context.positions_BT) > 1 else None
    device = query_BHTK.device
    make = partial(
        create_block_mask, mask_function(context, visibility), rows, None, length, length, device=device.type
    )
    mask = context.shared(("blocks", visibility), make)
    run: Any = _compiled_flex_attention() if device.type == "cuda" else flex_attention
    return run(query_BHTK, kv.key_BGSK, kv.value_BGSV, block_mask=mask, enable_gqa=True)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention)
