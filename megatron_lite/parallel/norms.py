"""Tensor-parallel norms: replicated weights on a sharded stream, and statistics over a sharded width.

Three cases:
- `ReplicatedNorm`: the norm of the residual stream. Each rank normalizes whole vectors; under sequence parallelism only
  those of its own tokens, so the gradients of gain and bias are partial and are summed in the graph.
- `HeadNorm`: a norm inside the tensor-parallel region, over a head's dimensions. The weights are the same for all heads, so every rank
  holds them and knows the gradient that its own heads give, with and without sequence parallelism.
- `ShardedNorm`: a norm inside the tensor-parallel region, over a width D of which each rank holds D/tp. The sums behind
  mean and variance run over all ranks, forward and backward; gain and bias are sharded like the width.

RMSNorm: r = sum x^2 / D.  LayerNorm: mean = sum x / D, then r = sum (x - mean)^2 / D.  y = (x - mean) / sqrt(r + eps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.models.norm import LayerNorm, LayerNorm1p, at_least_float32
from megatron_lite.parallel import collectives
from megatron_lite.parallel.layers import TensorParallelModule


@dataclass
class _Weights:
    """What a norm's forward reads from its module."""

    eps: float
    weight: Tensor
    bias: Tensor | None = None


class ReplicatedNorm(TensorParallelModule):
    """Any norm whose parameters every rank holds: the original forward, on weights whose gradients are summed."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if not self.tp.sequence_parallel:
            return super().forward(x)
        return self.plain_forward(_summed_weights(self, self.tp.on_stream), x)


class HeadNorm(TensorParallelModule):
    """Any norm that every rank applies to its own heads: the original forward, on weights whose gradients are summed."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., K), of this rank's heads."""
        return self.plain_forward(_summed_weights(self, self.tp.on_heads), x)


def _summed_weights(norm: ReplicatedNorm | HeadNorm, summed: Callable[[Tensor], Tensor]) -> _Weights:
    """What the norm's forward reads; the gradients of all parameters are summed in one all-reduce."""
    names, parameters = zip(*norm.named_parameters(recurse=False))
    together = summed(torch.cat(parameters))
    weights = dict(zip(names, together.split([parameter.numel() for parameter in parameters])))
    return _Weights(eps=norm.eps, **weights)


class ShardedNorm(TensorParallelModule):
    """LayerNorm, LayerNorm1p or RMSNorm over a width that is sharded: weight (and bias) of D/tp entries."""

    weight: Tensor
    bias: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """(..., D/tp) -> (..., D/tp) in x's dtype."""
        width, centered = x.shape[-1] * self.tp.size, at_least_float32(x)
        if isinstance(self, LayerNorm):
            centered = centered - collectives.total(centered.sum(-1, keepdim=True), self.tp.group) / width
        squares = collectives.total(centered.square().sum(-1, keepdim=True), self.tp.group)
        normed = centered * torch.rsqrt(squares / width + self.eps)
        gain = at_least_float32(self.weight) + (1.0 if isinstance(self, LayerNorm1p) else 0.0)
        if isinstance(self, LayerNorm):
            return (normed * gain + at_least_float32(self.bias)).to(x.dtype)
        return (normed * gain).to(x.dtype)
