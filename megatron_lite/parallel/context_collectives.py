"""What ranks that divide one sequence tell each other, as operators that recompute can keep.

    gather      every rank's x, in order of rank; the gradients arrive partial, are summed and handed back
    Exchange    slices to one rank and from another, in flight while the caller computes

`gather` is a custom operator of torch (`torch.library.custom_op`), not a `torch.autograd.Function`: only operators can be kept by
recompute, and what ranks have told each other is kept, not asked again (`recompute.py`). Its gradients are summed in
fp32 at least. On the meta device it only says shapes. `Exchange` is for use inside such an operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WAITS_FOR_OTHER_RANKS = True  # read by the watchdog: a rank whose stack ends in this file waits for others


def gather(x: Tensor, group: dist.ProcessGroup | None, *, size: int) -> Tensor:
    """(size, ...): x of every rank of `group`, which has `size` ranks. The gradient of x is the sum over ranks of the gradients of
    its place. group: None on the meta device."""
    return gather_operator(x, size, name_of(group))


def name_of(group: dist.ProcessGroup | None) -> str:
    """What an operator gets instead of a group, which is not among the types that operators take."""
    return "" if group is None else group.group_name


def group_named(name: str) -> dist.ProcessGroup:
    """The group that has this name."""
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


@torch.library.custom_op("mlite::context_gather", mutates_args=())
def gather_operator(x: Tensor, size: int, group: str) -> Tensor:
    """See `gather`."""
    gathered = x.new_empty(size, *x.shape)
    dist.all_gather_into_tensor(gathered.view(-1), x.contiguous().view(-1), group=group_named(group))
    return gathered


@torch.library.custom_op("mlite::context_reduce_scatter", mutates_args=())
def reduce_scatter_operator(x: Tensor, group: str) -> Tensor:
    """The sum over ranks of x[rank], of x (size, ...): the transpose of `gather`. Summed in fp32 at least, in the dtype of x."""
    partial = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    summed = torch.empty_like(partial[0])
    dist.reduce_scatter_tensor(summed.view(-1), partial.view(-1), group=group_named(group))
    return summed.to(x.dtype)


@gather_operator.register_fake
def _(x: Tensor, size: int, group: str) -> Tensor:
    return x.new_empty(size, *x.shape)


@reduce_scatter_operator.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape[1:])


def _remember_group(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[2]


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return reduce_scatter_operator(grad, ctx.group), None, None


gather_operator.register_autograd(_gather_backward, setup_context=_remember_group)
CONTEXT_GATHER = torch.ops.mlite.context_gather.default


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
