"""Parts of a divided sequence that travel between ranks while these compute. For use inside an operator that is not differentiated.

Every rank of the group takes part in every round, also one that sends and receives nothing in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.parallel.context_tiles import Route, Tile

WAITS_FOR_OTHER_RANKS = True  # read by the watchdog: a rank whose stack ends in this file waits for others


def group_named(name: str) -> dist.ProcessGroup:
    """The group that has this name, which is what an operator of torch can take."""
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


class Exchange:
    """One round, in flight from here until `wait`. sent: what each tile of the route is, tokens along dimension 2. like: a tensor of the
    same shape but for its tokens, and of the same dtype."""

    def __init__(self, sent: Sequence[Tensor], route: Route, *, like: Tensor, group: dist.ProcessGroup) -> None:
        self._tiles, self._like = route.received, like
        sends, receives = [0] * group.size(), [0] * group.size()
        sends[route.to] = sum(map(self._numbers, route.sent))
        receives[route.sender] = sum(map(self._numbers, route.received))
        # Both are held until `wait`, since the transfer reads and writes them.
        self._sent = torch.cat([x.flatten() for x in sent]) if sent else like.new_empty(0)
        self._received = like.new_empty(receives[route.sender])
        self._work = dist.all_to_all_single(self._received, self._sent, receives, sends, group=group, async_op=True)

    def wait(self) -> dict[Tile, Tensor]:
        """The tiles that came."""
        self._work.wait()
        parts = self._received.split([self._numbers(tile) for tile in self._tiles])
        return {tile: x.view(self._shape(tile)) for tile, x in zip(self._tiles, parts)}

    def _shape(self, tile: Tile) -> tuple[int, ...]:
        return (*self._like.shape[:2], tile.length, *self._like.shape[3:])

    def _numbers(self, tile: Tile) -> int:
        return math.prod(self._shape(tile))
