"""Normalizations over the last dimension, computed in float32 (in float64 for a float64 model).

    LayerNorm     y = g (x - mean) / sqrt(var + eps) + b          g starts at 1    arXiv 1607.06450
    LayerNorm1p   y = (1 + g) (x - mean) / sqrt(var + eps) + b    g starts at 0    Nemotron-4; Megatron's --apply-layernorm-1p
    RMSNorm       y = g x / sqrt(mean(x^2) + eps)                 g starts at 1    arXiv 1910.07467, Llama

LayerNorm1p stores the gain's distance from one: small numbers keep their precision in bf16, and weight decay, where it is
applied to g, pulls the gain to 1 and not to 0. It has a bias; "no bias" in the Nemotron-4 paper is about the linear layers.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.models.initialization import Constant, Distribution


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LayerNorm(nn.Module):
    """LayerNorm with gain `weight` (D,) and `bias` (D,)."""

    kinds: ClassVar[dict[str, str]] = {"weight": "norm", "bias": "norm"}

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D) in x's dtype."""
        gain, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        return F.layer_norm(at_least_float32(x), gain.shape, gain, bias, self.eps).to(x.dtype)

    def initial(self) -> dict[str, Distribution]:
        """Identity gain, no shift."""
        return {"weight": Constant(1.0), "bias": Constant(0.0)}


class LayerNorm1p(LayerNorm):
    """LayerNorm whose `weight` is the gain minus one."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D) in x's dtype."""
        gain, bias = 1.0 + at_least_float32(self.weight), at_least_float32(self.bias)
        return F.layer_norm(at_least_float32(x), gain.shape, gain, bias, self.eps).to(x.dtype)

    def initial(self) -> dict[str, Distribution]:
        """Identity gain, no shift."""
        return {"weight": Constant(0.0), "bias": Constant(0.0)}


class RMSNorm(nn.Module):
    """RMSNorm with gain `weight` (D,)."""

    kinds: ClassVar[dict[str, str]] = {"weight": "norm"}

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D) in x's dtype."""
        gain = at_least_float32(self.weight)
        return F.rms_norm(at_least_float32(x), gain.shape, gain, self.eps).to(x.dtype)

    def initial(self) -> dict[str, Distribution]:
        """Identity gain."""
        return {"weight": Constant(1.0)}


NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {
    "layernorm1p": LayerNorm1p,
    "rmsnorm": RMSNorm,
    "layernorm": LayerNorm,
}
