"""Attention over a sequence that is divided over ranks (`sequence_slices.py`).

Every rank keeps its queries. The keys and values of the others come to it in cp - 1 rounds: in round i rank r receives from
rank r - i what its queries see, computes with it and lets it go, while round i + 1 is on its way. The results of the rounds
are put together as a kernel puts together those of blocks of keys (online softmax; Ring Attention, arXiv 2310.01889).
Backward makes the same rounds, and sends the gradients of keys and values back in fp32, where their owner adds them up.

Why rounds and not one gather: nothing as long as the whole sequence is kept or even held. Of other ranks' keys and values at
most four slices are here at a time: two are computed with, two arrive. At 524,288 tokens, cp 16 and one group of 128 + 128
numbers in bf16 (Nemotron Nano 2 12B at tp 8) these are 34 MB, where a gather has 268 MB in forward and, with gradients in
fp32, three times as much in backward. And a rank gets only what it sees, 1.5 (cp - 1) slices on average: three quarters of
what a gather sends, or a ring in which all slices pass by all ranks. Every rank computes two pairs of slices in a round, so
that none waits for another.

With a window it gets no more than a window of keys before each of its slices. A layer that uses another one's keys and values
has them sent again, because to keep what came would be to keep the whole sequence; where all of them have a window, it is kept
(`context_window.py`).

Forward and backward are one operator each, so that recompute can keep the result (`recompute.py`) and no rank asks twice.

Shapes: B batch, H heads, G KV groups, T this rank's tokens (meta tokens, then its two slices), S these and what came from other ranks
before, K head dim of queries and keys, V that of values, X = K + V.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_lite.models.attention import AttentionCore
from megatron_lite.models.cache import KeyValue
from megatron_lite.models.context import LayerContext
from megatron_lite.parallel.context_collectives import Exchange
from megatron_lite.parallel.context_kernels import attend
from megatron_lite.parallel.context_sequence import DividedSequence
from megatron_lite.parallel.context_tiles import Rule, Tile
from megatron_lite.parallel.context_window import window_of_others
from megatron_lite.parallel.sequence_slices import ContextParallel, check_numbering


class ContextParallelAttention(AttentionCore):
    """Attention whose keys and values are divided over the ranks of `cp`, of which each has two slices."""

    cp: ContextParallel

    def attend(self, query_BHTK: Tensor, kv: KeyValue, context: LayerContext) -> Tensor:
        """(B, H, T, V): see `AttentionCore.attend`; the keys are those of the whole sequence."""
        assert context.cache is None, "generate refuses parallel.cp > 1"
        if context.documents_BT is not None:
            check_numbering(context.documents_BT, self.cp, prefix=context.prefix)
        kv_BGSX, rule = torch.cat([kv.key_BGSK, kv.value_BGSV], dim=-1), self._rule(context).numbers
        y_BHTV, _ = context_attention(query_BHTK, kv_BGSX, context.documents_BT, rule, self._group)
        return y_BHTV

    def shared(self, kv: KeyValue, context: LayerContext) -> KeyValue:
        """See `AttentionCore.shared`; with what this rank's queries see of others behind its own, if it is no more than a window."""
        rule = self._rule(context)
        if self.kv_window is None or not rule.limits_reach:
            return super().shared(kv, context)
        kv_BGTX = torch.cat([kv.key_BGSK, kv.value_BGSV], dim=-1)
        of_others = window_of_others(kv_BGTX, rule.numbers, self.cp.rank, self.cp.size, self._group)
        kv_BGSX = torch.cat([kv_BGTX, of_others], dim=2)
        key_BGSK, value_BGSV = kv_BGSX.split([kv.key_BGSK.shape[-1], kv.value_BGSV.shape[-1]], dim=-1)
        return super().shared(KeyValue(key_BGSK, value_BGSV), context)

    def _rule(self, context: LayerContext) -> Rule:
        return Rule(self.visibility, context.prefix, documents=context.documents_BT is not None)

    @property
    def _group(self) -> str:
        return "" if self.cp.group is None else self.cp.group.group_name  # operators take no groups


@torch.library.custom_op("mlite::context_attention", mutates_args=())
def context_attention(
    query_BHTK: Tensor, kv_BGSX: Tensor, documents_BT: Tensor | None, rule: Sequence[int], group: str
) -> tuple[Tensor, Tensor]:
    """Attention over a divided sequence, and its lse: (B, H, T, V) and (B, H, T).

    kv_BGSX: keys and values side by side, see `DividedSequence`. documents_BT: the index of the first token of each token's document, as
    `shard_sequence` numbers them; None: one document a row. rule: `Rule.numbers`.
    """
    sequence = DividedSequence.of(query_BHTK.shape[2], documents_BT, rule, group)
    heads = query_BHTK.shape[-1]
    merged = _Merged(sequence, query_BHTK, width=kv_BGSX.shape[-1] - heads)
    queries = sequence.slices(query_BHTK)
    for _, keys in sequence.rounds(kv_BGSX):
        for query, key, seen in sequence.pairs(keys):
            merged.add(query, *attend(sequence.part(query.of(queries), keys[key], (query, key, seen))))
    return merged.out_BHTV.to(query_BHTK.dtype), merged.lse_BHT


@torch.library.custom_op("mlite::context_attention_backward", mutates_args=())
def context_attention_backward(
    grad_BHTV: Tensor,
    query_BHTK: Tensor,
    kv_BGSX: Tensor,
    documents_BT: Tensor | None,
    out_BHTV: Tensor,
    lse_BHT: Tensor,
    rule: Sequence[int],
    group: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the queries and of the keys and values that are given; what other ranks' queries add to this rank's comes from them."""
    sequence = DividedSequence.of(query_BHTK.shape[2], documents_BT, rule, group)
    wide = torch.promote_types(query_BHTK.dtype, torch.float32)
    d_query, d_kv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (query_BHTK, kv_BGSX))
    queries, grads, outs, lses, d_queries, own = (
        sequence.slices(x) for x in (query_BHTK, grad_BHTV, out_BHTV, lse_BHT, d_query, d_kv)
    )
    returning: Exchange | None = None
    for route, keys in sequence.rounds(kv_BGSX):
        here = route is None
        d_keys = sequence.here(d_kv) if here else {key: torch.zeros_like(x, dtype=wide) for key, x in keys.items()}
        for query, key, seen in sequence.pairs(keys):
            part = sequence.part(query.of(queries), keys[key], (query, key, seen))
            dq, dk, dv = part.kernel().backward(part, query.of(grads), query.of(outs), query.of(lses))
            query.of(d_queries).add_(dq)
            d_keys[key].add_(torch.cat([dk, dv], dim=-1))
        _add(own, returning)
        if route is not None:
            returning = Exchange(list(d_keys.values()), route.back, like=d_kv, group=sequence.group)
    _add(own, returning)
    return d_query.to(query_BHTK.dtype), d_kv.to(kv_BGSX.dtype)


def _add(own: dict[int, Tensor], returning: Exchange | None) -> None:
    """Adds the gradients that another rank sends back for tiles of this one."""
    if returning is not None:
        for tile, grad in returning.wait().items():
            tile.of(own).add_(grad)


@context_attention.register_fake
def _(query_BHTK: Tensor, kv_BGSX: Tensor, documents_BT: Tensor | None, rule: Sequence[int], group: str) -> Any:
    wide = torch.promote_types(query_BHTK.dtype, torch.float32)
    batch, heads, length, width = query_BHTK.shape
    out_BTHV = query_BHTK.new_empty(batch, length, heads, kv_BGSX.shape[-1] - width)
    return out_BTHV.transpose(1, 2), query_BHTK.new_empty(batch, heads, length, dtype=wide)


@context_attention_backward.register_fake
def _(grad_BHTV: Tensor, query_BHTK: Tensor, kv_BGSX: Tensor, *others: Any) -> Any:
    query, kv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query_BHTK, kv_BGSX))
    return query, kv


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query_BHTK, kv_BGSX, documents_BT, ctx.rule, ctx.group = inputs
    ctx.save_for_backward(query_BHTK, kv_BGSX, documents_BT, *output)


def _backward(ctx: Any, grad_BHTV: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    return *context_attention_backward(grad_BHTV, *ctx.saved_tensors, ctx.rule, ctx.group), None, None, None


context_attention.register_autograd(_backward, setup_context=_remember)
CONTEXT_ATTENTION = torch.ops.mlite.context_attention.default


class _Merged:
    """Output and lse of all queries, of the parts added so far: lse = log(sum_i exp(lse_i)), out = sum_i exp(lse_i - lse) out_i."""

    def __init__(self, sequence: DividedSequence, query_BHTK: Tensor, *, width: int) -> None:
        wide = torch.promote_types(query_BHTK.dtype, torch.float32)
        batch, heads, length, _ = query_BHTK.shape
        # token by token, as the layer's output projection reads it
        self.out_BHTV = query_BHTK.new_zeros(batch, length, heads, width, dtype=wide).transpose(1, 2)
        self.lse_BHT = query_BHTK.new_full((batch, heads, length), -torch.inf, dtype=wide)
        self._outs, self._lses = sequence.slices(self.out_BHTV), sequence.slices(self.lse_BHT)

    def add(self, query: Tile, out_BHTV: Tensor, lse_BHT: Tensor) -> None:
        """Adds what one tile of queries got from one tile of keys."""
        out, lse = query.of(self._outs), query.of(self._lses)
        total = torch.logaddexp(lse, lse_BHT)
        out.mul_((lse - total).exp()[..., None]).add_(out_BHTV * (lse_BHT - total).exp()[..., None])
        lse.copy_(total)
