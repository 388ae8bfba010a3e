"""What a window reaches of other ranks' keys and values, once for all layers that share them (`attention.kv_groups`).

A layer without a window uses what the others send round by round and lets it go (`context_attention.py`): to keep it for the next layer
would be to keep the whole sequence. With a window of w tokens it is at most 2 w tokens, whatever the length, so the layer that
makes keys and values also hands on what it got of others', and no layer after it asks again.

The layers' gradients of these tokens are added up on the rank that used them, in the dtype of keys and values as all gradients of a
shared tensor are, and go back together; their owner adds them in fp32.

Shapes: B batch, G KV groups, T this rank's tokens, R tokens of other ranks that its queries see, X numbers of a key and a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_lite.parallel.context_collectives import Exchange
from megatron_lite.parallel.context_sequence import DividedSequence
from megatron_lite.parallel.context_tiles import Rule
from megatron_lite.parallel.sequence_slices import ContextParallel


@torch.library.custom_op("mlite::context_window", mutates_args=())
def window_of_others(kv_BGTX: Tensor, rule: Sequence[int], rank: int, size: int, group: str) -> Tensor:
    """(B, G, R, X): what this rank's queries see of others, in the order of `DividedSequence.coming`. rule: `Rule.numbers`."""
    sequence = DividedSequence.of(kv_BGTX.shape[2], None, rule, group)
    own = sequence.slices(kv_BGTX)
    rounds = [
        Exchange([tile.of(own) for tile in route.sent], route, like=kv_BGTX, group=sequence.group)
        for route in sequence.routes
    ]
    return torch.cat([x for coming in rounds for x in coming.wait().values()], dim=2)


@torch.library.custom_op("mlite::context_window_backward", mutates_args=())
def window_backward(grad_BGRX: Tensor, length: int, rule: Sequence[int], group: str) -> Tensor:
    """(B, G, T, X): the gradients of this rank's `length` tokens, from the ranks that used them."""
    sequence = DividedSequence.of(length, None, rule, group)
    batch, groups, _, width = grad_BGRX.shape
    wide = torch.promote_types(grad_BGRX.dtype, torch.float32)
    d_kv = grad_BGRX.new_zeros(batch, groups, length, width, dtype=wide)
    own = sequence.slices(d_kv)
    grads = dict(zip(sequence.coming, grad_BGRX.split([tile.length for tile in sequence.coming], dim=2)))
    rounds = [
        Exchange([grads[tile] for tile in route.received], route.back, like=d_kv, group=sequence.group)
        for route in sequence.routes
    ]
    for coming in rounds:
        for tile, grad in coming.wait().items():
            tile.of(own).add_(grad)
    return d_kv.to(grad_BGRX.dtype)


@window_of_others.register_fake
def _(kv_BGTX: Tensor, rule: Sequence[int], rank: int, size: int, group: str) -> Tensor:
    sequence = DividedSequence(ContextParallel(rank, size, None), int(kv_BGTX.shape[2]), Rule.of(rule))
    batch, groups, _, width = kv_BGTX.shape
    return kv_BGTX.new_empty(batch, groups, sum(tile.length for tile in sequence.coming), width)


@window_backward.register_fake
def _(grad_BGRX: Tensor, length: int, rule: Sequence[int], group: str) -> Tensor:
    batch, groups, _, width = grad_BGRX.shape
    return grad_BGRX.new_empty(batch, groups, length, width)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    kv_BGTX, rule, _, _, group = inputs
    ctx.given = kv_BGTX.shape[2], rule, group


def _backward(ctx: Any, grad_BGRX: Tensor) -> tuple[Tensor | None, ...]:
    return window_backward(grad_BGRX, *ctx.given), None, None, None, None


window_of_others.register_autograd(_backward, setup_context=_remember)
CONTEXT_WINDOW = torch.ops.mlite.context_window.default  # what `recompute.py` keeps
