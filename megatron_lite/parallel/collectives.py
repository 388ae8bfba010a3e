"""Differentiable collectives, which convert between replicated, sharded and partial tensors.

    function                  forward                     backward
    copy_in                   identity                    all-reduce        (f of Megatron-LM, section 3)
    reduce_out                all-reduce                  identity          (g of Megatron-LM)
    sequence_gather           all-gather                  reduce-scatter    (g of Korthikanti et al., arXiv 2205.05198)
    sequence_reduce_scatter   reduce-scatter              all-gather        (its conjugate)
    scatter                   this rank's slice           all-gather
    gather                    all-gather                  this rank's slice
    total                     all-reduce                  all-reduce

A tensor is replicated (every rank holds the same), partial (the truth is the sum over ranks) or sharded (a slice each);
a gradient is too. `copy_in` takes a replicated tensor whose gradient comes back partial, `reduce_out` a partial one whose
gradient comes back replicated, `total` a partial one whose gradient comes back partial as well (a statistic that every
rank uses with its own shard). Any strides; results are contiguous. The same code runs on gloo and NCCL. The
operators never write into their input, which recompute may hold on to, and torch.compile traces them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WAITS_FOR_OTHER_RANKS = True  # read by the watchdog: a rank whose stack ends in this file waits for others
_c10d = torch.ops._c10d_functional  # what torch.distributed's functional collectives call, under names that stay


def copy_in(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, whose gradient is summed over `group`."""
    return _Conjugate.apply(x, _identity, partial(_all_reduce, group=group))


def reduce_out(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of x over `group`."""
    return _Conjugate.apply(x, partial(_all_reduce, group=group), _identity)


def total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of x over `group`, whose gradient is summed too: for a statistic that each rank uses on its own shard."""
    both = partial(_all_reduce, group=group)
    return _Conjugate.apply(x, both, both)


def sequence_gather(x: Tensor, group: dist.ProcessGroup, *, dim: int = 1) -> Tensor:
    """All slices of x along `dim`; the gradient arrives partial and is summed and cut."""
    return _Conjugate.apply(
        x, partial(_all_gather, group=group, dim=dim), partial(_reduce_scatter, group=group, dim=dim)
    )


def sequence_reduce_scatter(x: Tensor, group: dist.ProcessGroup, *, dim: int = 1) -> Tensor:
    """This rank's slice along `dim` of the sum of x over `group`. Raises ValueError when `dim` does not divide."""
    return _Conjugate.apply(
        x, partial(_reduce_scatter, group=group, dim=dim), partial(_all_gather, group=group, dim=dim)
    )


def scatter(x: Tensor, group: dist.ProcessGroup, *, dim: int = 1) -> Tensor:
    """This rank's slice along `dim` of the replicated x. Raises ValueError when `dim` does not divide."""
    return _Conjugate.apply(x, partial(_slice, group=group, dim=dim), partial(_all_gather, group=group, dim=dim))


def gather(x: Tensor, group: dist.ProcessGroup, *, dim: int = -1) -> Tensor:
    """All slices of x along `dim`, used alike on every rank, so that the gradient arrives replicated and is cut."""
    return _Conjugate.apply(x, partial(_all_gather, group=group, dim=dim), partial(_slice, group=group, dim=dim))


def maximum(x: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """The elementwise maximum of x over the ranks of each group in turn; not differentiable."""
    for group in groups:
        x = _c10d.wait_tensor(_c10d.all_reduce(x.contiguous(), "max", group.group_name))
    return x


class _Conjugate(torch.autograd.Function):
    """A linear map `there` whose transpose is `back`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


def _identity(x: Tensor) -> Tensor:
    return x.view_as(x)


def _all_reduce(x: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_reduce(x.contiguous(), "sum", group.group_name))


def _all_gather(x: Tensor, *, group: dist.ProcessGroup, dim: int) -> Tensor:
    dim, size = dim % x.dim(), group.size()
    stacked = _c10d.wait_tensor(_c10d.all_gather_into_tensor(x.contiguous(), size, group.group_name))
    slices = stacked.unflatten(0, (size, x.shape[0]))
    # contiguous as it is; torch.compile of torch 2.11 gives what ends in a `contiguous` without effect no gradient
    return slices.movedim(0, dim).flatten(dim, dim + 1)


def _reduce_scatter(x: Tensor, *, group: dist.ProcessGroup, dim: int) -> Tensor:
    dim, size = dim % x.dim(), group.size()
    slices = x.unflatten(dim, (size, slice_length(x, size, dim))).movedim(dim, 0)
    stacked = slices.flatten(0, 1).contiguous()
    return _c10d.wait_tensor(_c10d.reduce_scatter_tensor(stacked, "sum", size, group.group_name))


def _slice(x: Tensor, *, group: dist.ProcessGroup, dim: int) -> Tensor:
    length = slice_length(x, group.size(), dim)
    return x.narrow(dim, group.rank() * length, length).clone(memory_format=torch.contiguous_format)


def slice_length(x: Tensor, size: int, dim: int) -> int:
    """Entries of x along `dim` for each of `size` ranks. Raises ValueError when they do not divide."""
    if x.shape[dim] % size:
        raise ValueError(
            f"dimension {dim} of a tensor of shape {tuple(x.shape)} has {x.shape[dim]} entries, which do not divide "
            f"over parallel.tp={size}; with parallel.sequence_parallel the sequence length must be a multiple of it"
        )
    return x.shape[dim] // size
