"""Slices of a divided sequence that travel between ranks while these compute. For use inside an operator that is not differentiated.

Every rank of the group takes part in every round, also one that sends and receives nothing in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

WAITS_FOR_OTHER_RANKS = True  # read by the watchdog: a rank whose stack ends in this file waits for others


def group_named(name: str) -> dist.ProcessGroup:
    """The group that has this name, which is what an operator of torch can take."""
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Route:
    """What one round of an exchange carries for this rank: the slices `sent` to rank `to`, and those `received` from rank `sender`,
    by their numbers. Every rank of the group has a route of the same round, and either tuple may be empty."""

    to: int
    sender: int
    sent: tuple[int, ...]
    received: tuple[int, ...]

    @property
    def back(self) -> Route:
        """The same slices on their way back."""
        return Route(to=self.sender, sender=self.to, sent=self.received, received=self.sent)


class Exchange:
    """One round, in flight from here until `wait`. slices: by number, all of the shape and dtype of `like`."""

    def __init__(self, slices: Mapping[int, Tensor], route: Route, *, like: Tensor, group: dist.ProcessGroup) -> None:
        self.route = route
        sends, receives = [0] * group.size(), [0] * group.size()
        sends[route.to], receives[route.sender] = len(route.sent), len(route.received)
        # Both are held until `wait`, since the transfer reads and writes them.
        self._sent = (
            torch.stack([slices[number] for number in route.sent]) if route.sent else like.new_empty(0, *like.shape)
        )
        self._received = like.new_empty(len(route.received), *like.shape)
        self._work = dist.all_to_all_single(self._received, self._sent, receives, sends, group=group, async_op=True)

    def wait(self) -> dict[int, Tensor]:
        """The slices that came, by number."""
        self._work.wait()
        return dict(zip(self.route.received, self._received.unbind(0)))
