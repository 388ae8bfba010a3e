"""What the slices of a divided sequence send to each other, as operators whose results recompute can keep.

    preceding         the end of the slice before each slice
    entering_states   the state of a linear recurrence with which each slice begins

Their sizes do not depend on the length of the sequence. They are custom operators of torch (`torch.library.custom_op`), not
`torch.autograd.Function`s: recompute can only keep the results of operators, and keeps these instead of sending them again
(`recompute.py`). On the meta device they return shapes only.

Each rank holds two slices, in the order of `ContextParallel.slices`, and gives and gets one tensor for both, (2, ...). Beside the
slice before a rank's first one lies the one after its second: rank r - 1 holds both. The slice after its first and the one before its
second are on rank r + 1, and on the last rank they are its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_lite.parallel.sequence_slices import ContextParallel

WAITS_FOR_OTHER_RANKS = True  # read by the watchdog: a rank whose stack ends in this file waits for others
_c10d = torch.ops._c10d_functional  # what torch.distributed's functional collectives call, under names that stay


def preceding(ends: Tensor, cp: ContextParallel) -> Tensor:
    """(2, ...) the ends of this rank's slices -> (2, ...) the ends of those before them; zero before the sequence's first."""
    return trade(ends.flip(0), cp.rank, cp.size, _name(cp))


def entering_states(decays: Tensor, states: Tensor, cp: ContextParallel) -> Tensor:
    """(2, ...): the state that enters each of this rank's slices, zero for the sequence's first.

    states: (2, ...), what each slice leaves when it begins with zero. decays: (2, ...), broadcast over the states, how much is left
    of what enters: a slice makes `decay * h + state` of the state h.
    """
    entering, _ = pass_states(decays, states, cp.rank, cp.size, _name(cp))
    return entering


def _name(cp: ContextParallel) -> str:
    """What operators take instead of a group."""
    return "" if cp.group is None else cp.group.group_name


# ------------------------------------------------------------------ ends


@torch.library.custom_op("mlite::context_trade", mutates_args=())
def trade(x: Tensor, rank: int, size: int, group: str) -> Tensor:
    """x[0] goes to rank r - 1 and x[1] to rank r + 1, the last rank's to itself; (2, ...) what comes from there, zero where there is
    nobody. It is its own transpose."""
    counts = [0] * size
    counts[min(rank + 1, size - 1)] = 1
    if rank:
        counts[rank - 1] = 1
    sent = (x if rank else x[1:]).contiguous()
    received = _c10d.wait_tensor(_c10d.all_to_all_single(sent, counts, counts, group))
    return received if rank else torch.cat([torch.zeros_like(received), received])


@trade.register_fake
def _(x: Tensor, rank: int, size: int, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _remember_place(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.place = inputs[1:]


def _trade_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return trade(grad, *ctx.place), None, None, None


trade.register_autograd(_trade_backward, setup_context=_remember_place)

# ------------------------------------------------------------------ states


@torch.library.custom_op("mlite::context_pass_states", mutates_args=())
def pass_states(decays: Tensor, states: Tensor, rank: int, size: int, group: str) -> tuple[Tensor, Tensor]:
    """(`entering_states`, the decays of all slices (2 size, ...) for backward)."""
    sent = torch.cat([decays.flatten(1), states.flatten(1)], dim=1)
    of_all = _all_slices(sent, size, group)
    all_decays, all_states = of_all.split([decays[0].numel(), states[0].numel()], dim=1)
    all_decays, all_states = all_decays.unflatten(1, decays.shape[1:]), all_states.unflatten(1, states.shape[1:])
    entering = [torch.zeros_like(states[0])]
    for decay, state in zip(all_decays[:-1], all_states[:-1]):
        entering.append(torch.addcmul(state, decay, entering[-1]))
    return torch.stack([entering[rank], entering[2 * size - 1 - rank]]), all_decays.contiguous()


@torch.library.custom_op("mlite::context_pass_gradients", mutates_args=())
def pass_gradients(
    grad: Tensor, entering: Tensor, all_decays: Tensor, rank: int, size: int, group: str
) -> tuple[Tensor, Tensor]:
    """The gradients of (decays, states). grad: of what enters this rank's slices, from inside these."""
    of_all = _all_slices(grad.flatten(1), size, group).unflatten(1, grad.shape[1:])
    leaving = [torch.zeros_like(grad[0])]  # the gradient of what leaves a slice, from the last to the first
    for inside, decay in zip(of_all[1:].flip(0), all_decays[1:].flip(0)):
        leaving.append(torch.addcmul(inside, decay, leaving[-1]))
    d_states = torch.stack([leaving[2 * size - 1 - rank], leaving[rank]])
    return (d_states * entering).sum_to_size(2, *all_decays.shape[1:]), d_states


def _all_slices(x: Tensor, size: int, group: str) -> Tensor:
    """(2, n) of this rank -> (2 size, n) of all, in the order of the sequence."""
    by_rank = _c10d.wait_tensor(_c10d.all_gather_into_tensor(x.contiguous(), size, group)).unflatten(0, (size, 2))
    return torch.cat([by_rank[:, 0], by_rank[:, 1].flip(0)])


@pass_states.register_fake
def _(decays: Tensor, states: Tensor, rank: int, size: int, group: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(states, memory_format=torch.contiguous_format), decays.new_empty(
        2 * size, *decays.shape[1:]
    )


@pass_gradients.register_fake
def _(grad: Tensor, entering: Tensor, all_decays: Tensor, rank: int, size: int, group: str) -> tuple[Tensor, Tensor]:
    return all_decays.new_empty(2, *all_decays.shape[1:]), torch.empty_like(grad, memory_format=torch.contiguous_format)


def _remember_states(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output)
    ctx.place = inputs[2:]


def _pass_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *pass_gradients(grad, *ctx.saved_tensors, *ctx.place), None, None, None


pass_states.register_autograd(_pass_backward, setup_context=_remember_states)

# What `recompute.py` keeps.
SLICE_OPERATORS = (torch.ops.mlite.context_trade.default, torch.ops.mlite.context_pass_states.default)
