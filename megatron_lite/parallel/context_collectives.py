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
        self._route, self._like = route, like
        sends, receives = [0] * group.size(), [0] * group.size()
        sends[route.to] = sum(math.prod(shape) for shape in self._shapes(route.sent))
        receives[route.sender] = sum(math.prod(shape) for shape in self._shapes(route.received))
        # Both are held until `wait`, since the transfer reads and writes them.
        self._sent, self._received = (like.new_empty(sum(numbers)) for numbers in (sends, receives))
        for tile, x in zip(self._tiles(self._sent, route.sent), sent):
            tile.copy_(x)
        self._work = dist.all_to_all_single(self._received, self._sent, receives, sends, group=group, async_op=True)

    def wait(self) -> dict[Tile, Tensor]:
        """The tiles that came."""
        self._work.wait()
        return dict(zip(self._route.received, self._tiles(self._received, self._route.received)))

    def _shapes(self, tiles: Sequence[Tile]) -> list[tuple[int, ...]]:
        return [(*self._like.shape[:2], tile.length, *self._like.shape[3:]) for tile in tiles]

    def _tiles(self, numbers: Tensor, tiles: Sequence[Tile]) -> list[Tensor]:
        """Views of one tile after the other."""
        shapes = self._shapes(tiles)
        return [x.view(shape) for x, shape in zip(numbers.split(list(map(math.prod, shapes))), shapes)]
