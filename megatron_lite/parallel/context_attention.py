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
has them sent again: to keep what came would be to keep the whole sequence.

Forward and backward are one operator each, so that recompute can keep the result (`recompute.py`) and no rank asks twice.

Shapes: B batch, H heads, G KV groups, T this rank's tokens (meta tokens, then its two slices), S tokens of the sequence (meta tokens
included), K head dim of queries and keys, V that of values, X = K + V.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.models.attention import AttentionCore
from megatron_lite.models.attention_mask import Visibility
from megatron_lite.models.cache import KeyValue
from megatron_lite.models.context import LayerContext
from megatron_lite.parallel.context_collectives import Exchange, group_named
from megatron_lite.parallel.context_kernels import Part, attend
from megatron_lite.parallel.context_tiles import META, Route, Rule, Tile, View, narrowed, routes, tiles, view
from megatron_lite.parallel.sequence_slices import ContextParallel, check_numbering


class ContextParallelAttention(AttentionCore):
    """Attention whose keys and values are divided over the ranks of `cp`, of which each has two slices."""

    cp: ContextParallel

    def attend(self, query_BHTK: Tensor, kv: KeyValue, context: LayerContext) -> Tensor:
        """(B, H, T, V): see `AttentionCore.attend`; the keys are those of the whole sequence."""
        assert context.cache is None, "generate refuses parallel.cp > 1"
        if context.documents_BT is not None:
            check_numbering(context.documents_BT, self.cp, prefix=context.prefix)
        kv_BGTX = torch.cat([kv.key_BGSK, kv.value_BGSV], dim=-1)
        window = -1 if self.visibility.window is None else self.visibility.window
        rule = [window, self.visibility.always_visible, context.prefix]
        group = "" if self.cp.group is None else self.cp.group.group_name  # operators take no groups
        y_BHTV, _ = context_attention(query_BHTK, kv_BGTX, context.documents_BT, rule, group)
        return y_BHTV


@torch.library.custom_op("mlite::context_attention", mutates_args=())
def context_attention(
    query_BHTK: Tensor, kv_BGTX: Tensor, documents_BT: Tensor | None, rule: Sequence[int], group: str
) -> tuple[Tensor, Tensor]:
    """Attention over a divided sequence, and its lse: (B, H, T, V) and (B, H, T).

    kv_BGTX: keys and values side by side. documents_BT: the index of the first token of each token's document, as
    `shard_sequence` numbers them; None: one document a row. rule: window (-1: none), always visible, prefix.
    """
    sequence = _Sequence.of(kv_BGTX, documents_BT, rule, group_named(group))
    heads = query_BHTK.shape[-1]
    merged = _Merged(sequence, query_BHTK, width=kv_BGTX.shape[-1] - heads)
    queries = sequence.slices(query_BHTK)
    for _, keys in sequence.rounds(kv_BGTX):
        for query, key, seen in sequence.pairs(keys):
            merged.add(query, *attend(sequence.part(query.of(queries), keys[key], (query, key, seen))))
    return merged.out_BHTV.to(query_BHTK.dtype), merged.lse_BHT


@torch.library.custom_op("mlite::context_attention_backward", mutates_args=())
def context_attention_backward(
    grad_BHTV: Tensor,
    query_BHTK: Tensor,
    kv_BGTX: Tensor,
    documents_BT: Tensor | None,
    out_BHTV: Tensor,
    lse_BHT: Tensor,
    rule: Sequence[int],
    group: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the queries and of this rank's keys and values; what other ranks' queries add comes from them."""
    sequence = _Sequence.of(kv_BGTX, documents_BT, rule, group_named(group))
    wide = torch.promote_types(query_BHTK.dtype, torch.float32)
    d_query, d_kv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (query_BHTK, kv_BGTX))
    queries, grads, outs, lses, d_queries, own = (
        sequence.slices(x) for x in (query_BHTK, grad_BHTV, out_BHTV, lse_BHT, d_query, d_kv)
    )
    returning: Exchange | None = None
    for route, keys in sequence.rounds(kv_BGTX):
        d_keys = {key: key.of(own) if route is None else torch.zeros_like(x, dtype=wide) for key, x in keys.items()}
        for query, key, seen in sequence.pairs(keys):
            part = sequence.part(query.of(queries), keys[key], (query, key, seen))
            dq, dk, dv = part.kernel().backward(part, query.of(grads), query.of(outs), query.of(lses))
            query.of(d_queries).add_(dq)
            d_keys[key].add_(torch.cat([dk, dv], dim=-1))
        _add(own, returning)
        if route is not None:
            returning = Exchange(list(d_keys.values()), route.back, like=d_kv, group=sequence.group)
    _add(own, returning)
    return d_query.to(query_BHTK.dtype), d_kv.to(kv_BGTX.dtype)


def _add(own: dict[int, Tensor], returning: Exchange | None) -> None:
    """Adds the gradients that another rank sends back for tiles of this one."""
    if returning is not None:
        for tile, grad in returning.wait().items():
            tile.of(own).add_(grad)


@context_attention.register_fake
def _(query_BHTK: Tensor, kv_BGTX: Tensor, documents_BT: Tensor | None, rule: Sequence[int], group: str) -> Any:
    wide = torch.promote_types(query_BHTK.dtype, torch.float32)
    batch, heads, length, width = query_BHTK.shape
    out_BTHV = query_BHTK.new_empty(batch, length, heads, kv_BGTX.shape[-1] - width)
    return out_BTHV.transpose(1, 2), query_BHTK.new_empty(batch, heads, length, dtype=wide)


@context_attention_backward.register_fake
def _(grad_BHTV: Tensor, query_BHTK: Tensor, kv_BGTX: Tensor, *others: Any) -> Any:
    query, kv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query_BHTK, kv_BGTX))
    return query, kv


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query_BHTK, kv_BGTX, documents_BT, ctx.rule, ctx.group = inputs
    ctx.save_for_backward(query_BHTK, kv_BGTX, documents_BT, *output)


def _backward(ctx: Any, grad_BHTV: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    return *context_attention_backward(grad_BHTV, *ctx.saved_tensors, ctx.rule, ctx.group), None, None, None


context_attention.register_autograd(_backward, setup_context=_remember)
CONTEXT_ATTENTION = torch.ops.mlite.context_attention.default


@dataclass(frozen=True)
class _Sequence:
    """A divided sequence, of which this rank has the meta tokens and the two slices of `cp`. begins_BT: where in the sequence each
    of its tokens' documents begins, meta tokens counted; None: one document a row."""

    cp: ContextParallel
    slice_length: int
    rule: Rule
    begins_BT: Tensor | None

    @classmethod
    def of(
        cls, kv_BGTX: Tensor, documents_BT: Tensor | None, rule: Sequence[int], group: dist.ProcessGroup
    ) -> _Sequence:
        """What the arguments of an operator say."""
        window, always, prefix = rule
        described = Rule(Visibility(None if window < 0 else window, always), prefix, documents_BT is not None)
        cp = ContextParallel(group.rank(), group.size(), group)
        begins_BT = None if documents_BT is None else documents_BT.int() + prefix  # half as many bytes to compare
        return cls(cp, (kv_BGTX.shape[2] - prefix) // 2, described, begins_BT)

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that divide it."""
        assert self.cp.group is not None, "a sequence that is computed has a group"
        return self.cp.group

    @property
    def numbers(self) -> list[int]:
        """What this rank has: the meta tokens, if there are any, and its two slices."""
        return [META, *self.cp.slices] if self.rule.prefix else list(self.cp.slices)

    def slices(self, x: Tensor) -> dict[int, Tensor]:
        """Views of what belongs to each of `numbers`, of a tensor with this rank's tokens along dimension 2."""
        lengths = [self.rule.prefix if number == META else self.slice_length for number in self.numbers]
        return dict(zip(self.numbers, x.split(lengths, dim=2)))

    def rounds(self, kv_BGTX: Tensor) -> Iterator[tuple[Route | None, dict[Tile, Tensor]]]:
        """Keys and values by tile: this rank's (no route), then those of each other rank of which it sees any."""
        own = self.slices(kv_BGTX)
        ways = routes(self.cp.rank, self.cp.size, self.slice_length, self.rule)
        keys = {tile: tile.of(own) for tile in self.queries}
        for route, following in zip([None, *ways], [*ways, None]):
            coming = None
            if following is not None:
                sent = [tile.of(own) for tile in following.sent]
                coming = Exchange(sent, following, like=kv_BGTX, group=self.group)
            yield route, keys
            if coming is not None:
                keys = coming.wait()

    @cached_property
    def queries(self) -> list[Tile]:
        """The tiles of this rank."""
        return list(tiles(self.numbers, self.slice_length, self.rule))

    def pairs(self, keys: Iterable[Tile]) -> Iterator[tuple[Tile, Tile, View]]:
        """Tiles of queries, tiles of these keys, and what the former see of the latter, unless it is nothing. A tile's own keys come
        before others, so that every query has seen a key from then on."""
        for query in self.queries:
            for key in sorted(keys, key=lambda tile: tile != query):
                seen = view(query, key, self.rule)
                if self.begins_BT is not None and self.begins_BT.device.type == "cpu":
                    seen = narrowed(seen, query, key, rule=self.rule, begins_BT=self._begins(query))
                if seen is not View.NOTHING:
                    yield query, key, seen

    def part(self, query_BHTK: Tensor, kv_BGSX: Tensor, pair: tuple[Tile, Tile, View]) -> Part:
        """What a kernel needs for one pair of tiles."""
        query, key, seen = pair
        heads = query_BHTK.shape[-1]
        key_BGSK, value_BGSV = kv_BGSX.split([heads, kv_BGSX.shape[-1] - heads], dim=-1)
        mask = self.mask(query, key, query_BHTK.device) if seen is View.SOME else None
        return Part(query_BHTK, key_BGSK, value_BGSV, mask=mask, causal=seen is View.CAUSAL)

    def mask(self, query: Tile, key: Tile, device: torch.device) -> Tensor:
        """(B or 1, 1, tokens of `query`, tokens of `key`) bool, True = attend.

        A key between where a query's document begins and the query is of this document. So no document of another rank's tokens is
        asked for, and the position of such a key, counted from the meta tokens, follows from the query's document.
        """
        query_T1, key_S = (
            torch.arange(tile.first, tile.last + 1, device=device, dtype=torch.int32) for tile in (query, key)
        )
        query_T1, visibility, prefix = query_T1[:, None], self.rule.visibility, self.rule.prefix
        if self.begins_BT is None or query.number == META:
            return visibility.shows(query_T1, key_S)[None, None]
        begins_BT1 = self._begins(query)[:, :, None]
        to_positions = begins_BT1 - prefix
        if key.number == META:
            return visibility.shows(query_T1 - to_positions, key_S)[:, None]
        seen_BTS = visibility.shows(query_T1 - to_positions, key_S - to_positions)
        return (seen_BTS & (key_S >= begins_BT1))[:, None]

    def _begins(self, query: Tile) -> Tensor:
        assert self.begins_BT is not None, "one document a row"
        start = query.start
        if query.number != META:
            start += self.rule.prefix + self.cp.slices.index(query.number) * self.slice_length
        return self.begins_BT[:, start : start + query.length]


class _Merged:
    """Output and lse of all queries, of the parts added so far: lse = log(sum_i exp(lse_i)), out = sum_i exp(lse_i - lse) out_i."""

    def __init__(self, sequence: _Sequence, query_BHTK: Tensor, *, width: int) -> None:
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
