"""What context-parallel ranks send to each other in the operators of a divided sequence (`parallel/context_*.py`).

These are operators of their own, whose arguments do not say how much travels: a rank gets the keys that its queries see, and its
states go to each of the other ranks.

Shapes: B batch, G KV groups, T a rank's tokens, R tokens of others that its queries see, X numbers of a key and a value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_lite.parallel.context_attention import CONTEXT_ATTENTION
from megatron_lite.parallel.context_tiles import Rule, routes
from megatron_lite.parallel.context_window import CONTEXT_WINDOW

_GRADIENT_BYTES = 4  # of a key's or a value's number: they travel in fp32


def tokens_sent(rule: Sequence[int], length: int, ranks: int) -> float:
    """Tokens whose keys and values a rank sends, on average. rule: `Rule.numbers`. length: of its part of the sequence."""
    found = Rule.of(rule)
    of_all = (routes(rank, ranks, (length - found.prefix) // 2, found) for rank in range(ranks))
    return sum(tile.length for rounds in of_all for route in rounds for tile in route.sent) / ranks


def _attention(args: Sequence[Any], ranks: int) -> float:
    query_BHTK, kv_BGSX, _, rule, _ = args
    return _keys(query_BHTK.shape[2], kv_BGSX, rule, ranks=ranks) * kv_BGSX.element_size()


def _attention_backward(args: Sequence[Any], ranks: int) -> float:
    _, query_BHTK, kv_BGSX, *_, rule, _ = args
    numbers = _keys(query_BHTK.shape[2], kv_BGSX, rule, ranks=ranks)
    return numbers * (kv_BGSX.element_size() + _GRADIENT_BYTES)  # keys and values are sent again


def _keys(length: int, kv_BGSX: Tensor, rule: Sequence[int], *, ranks: int) -> float:
    """Numbers. None are sent where keys that layers share have those of other ranks behind them."""
    if kv_BGSX.shape[2] > length:
        return 0.0
    return tokens_sent(rule, length, ranks) * kv_BGSX[:, :, 0].numel()


def _window(args: Sequence[Any], ranks: int) -> float:
    kv_BGTX, rule, *_ = args
    return tokens_sent(rule, kv_BGTX.shape[2], ranks) * kv_BGTX[:, :, 0].nbytes


def _window_backward(args: Sequence[Any], ranks: int) -> float:
    grad_BGRX, length, rule, _ = args
    return tokens_sent(rule, length, ranks) * grad_BGRX[:, :, 0].numel() * _GRADIENT_BYTES


def _states(args: Sequence[Any], ranks: int) -> float:
    decays, states, *_ = args
    return (ranks - 1) * (decays.nbytes + states.nbytes)


def _states_backward(args: Sequence[Any], ranks: int) -> float:
    return (ranks - 1) * args[0].nbytes


SENT: Mapping[Any, Callable[[Sequence[Any], int], float]] = {
    CONTEXT_ATTENTION.overloadpacket: _attention,
    torch.ops.mlite.context_attention_backward: _attention_backward,
    CONTEXT_WINDOW.overloadpacket: _window,
    torch.ops.mlite.context_window_backward: _window_backward,
    torch.ops.mlite.context_pass_states: _states,
    torch.ops.mlite.context_pass_gradients: _states_backward,
}
"""Operator -> bytes that a rank sends, on average, from its arguments and the number of ranks."""
