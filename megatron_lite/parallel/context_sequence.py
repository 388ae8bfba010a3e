"""A divided sequence as one rank sees it in an attention layer: its own tokens, what comes to it from others, and who sees what.

Keys and values lie in one tensor, along dimension 2: the rank's T tokens (meta tokens, then its two slices), and behind them, if it has
all that its queries see already, what came from the other ranks.

Shapes: B batch, H heads, G KV groups, T this rank's tokens, S these and what came from others, K head dim of queries and keys, V that of
values, X = K + V.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.parallel.context_collectives import Exchange, group_named
from megatron_lite.parallel.context_kernels import Part
from megatron_lite.parallel.context_tiles import META, Route, Rule, Tile, View, narrowed, routes, tiles, view
from megatron_lite.parallel.sequence_slices import ContextParallel


@dataclass(frozen=True)
class DividedSequence:
    """A sequence of which this rank has `length` tokens: the meta tokens and the two slices of `cp`.

    begins_BT: where in the sequence each of its tokens' documents begins, meta tokens counted; None: one document a row.
    """

    cp: ContextParallel
    length: int
    rule: Rule
    begins_BT: Tensor | None = None

    @classmethod
    def of(cls, length: int, documents_BT: Tensor | None, rule: Sequence[int], group: str) -> DividedSequence:
        """What the arguments of an operator say."""
        found, ranks = Rule.of(rule), group_named(group)
        begins_BT = None if documents_BT is None else documents_BT.int() + found.prefix  # half as many bytes to compare
        return cls(ContextParallel(ranks.rank(), ranks.size(), ranks), length, found, begins_BT)

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that divide it."""
        assert self.cp.group is not None, "a sequence that is computed has a group"
        return self.cp.group

    @property
    def slice_length(self) -> int:
        """Tokens of a slice."""
        return (self.length - self.rule.prefix) // 2

    @property
    def numbers(self) -> list[int]:
        """What this rank has: the meta tokens, if there are any, and its two slices."""
        return [META, *self.cp.slices] if self.rule.prefix else list(self.cp.slices)

    @property
    def routes(self) -> tuple[Route, ...]:
        """How this rank gets what its queries see of others' keys."""
        return routes(self.cp.rank, self.cp.size, self.slice_length, self.rule)

    @property
    def coming(self) -> list[Tile]:
        """What it gets, in the order in which it lies behind this rank's tokens."""
        return [tile for route in self.routes for tile in route.received]

    @cached_property
    def queries(self) -> list[Tile]:
        """The tiles of this rank."""
        return list(tiles(self.numbers, self.slice_length, self.rule))

    def slices(self, x: Tensor) -> dict[int, Tensor]:
        """Views of what belongs to each of `numbers`, of a tensor that begins with this rank's tokens along dimension 2."""
        lengths = [self.rule.prefix if number == META else self.slice_length for number in self.numbers]
        return dict(zip(self.numbers, x[:, :, : self.length].split(lengths, dim=2)))

    def here(self, kv_BGSX: Tensor) -> dict[Tile, Tensor]:
        """Views by tile of all that a tensor has: this rank's tiles, and those that came from others."""
        own = self.slices(kv_BGSX)
        found = {tile: tile.of(own) for tile in self.queries}
        if self.has_all(kv_BGSX):
            lengths = [tile.length for tile in self.coming]
            found |= zip(self.coming, kv_BGSX[:, :, self.length :].split(lengths, dim=2))
        return found

    def has_all(self, kv_BGSX: Tensor) -> bool:
        """Whether what this rank's queries see of other ranks is there already."""
        # No rank's queries see its own tokens only: before one of its slices lies another's.
        return kv_BGSX.shape[2] > self.length

    def rounds(self, kv_BGSX: Tensor) -> Iterator[tuple[Route | None, dict[Tile, Tensor]]]:
        """Keys and values by tile: what is here (no route), then what comes from each other rank of which its queries see any."""
        own, keys = self.slices(kv_BGSX), self.here(kv_BGSX)
        ways = () if self.has_all(kv_BGSX) else self.routes
        for route, following in zip([None, *ways], [*ways, None]):
            coming = None
            if following is not None:
                sent = [tile.of(own) for tile in following.sent]
                coming = Exchange(sent, following, like=kv_BGSX, group=self.group)
            yield route, keys
            if coming is not None:
                keys = coming.wait()

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
