"""Feed-forward layers: plain with squared ReLU (Nemotron-4), gated with SiLU (Llama).

Squared ReLU (Primer, arXiv 2109.08668):  down(relu(up(x))^2)
SwiGLU (arXiv 2002.05202):                down(silu(gate(x)) up(x))

Gate and up stay two parameters, so that a tensor-parallel shard of each is one contiguous range of rows.

Shapes: B batch, T sequence, D hidden, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_lite.models.config import ModelConfig
from megatron_lite.models.context import LayerContext
from megatron_lite.models.linear import Linear
from megatron_lite.models.pattern import LayerSpec


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    return _SquaredReLU.apply(x)


class _SquaredReLU(torch.autograd.Function):
    """y = r^2 with r = max(x, 0), so dy/dx = 2 r: three passes over memory, where plain autograd makes nine."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        r = x.relu()
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> Tensor:
        (r,) = ctx.saved_tensors
        return torch.addcmul(r.new_zeros(()), r, d_y, value=2.0)


PLAIN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"squared_relu": squared_relu}
GATED_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu}


class MLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = PLAIN_ACTIVATIONS[config.mlp.activation]
        self.up = Linear(config.hidden_size, config.mlp.ffn_size, init_std=config.init_std, bias=config.linear_bias)
        self.down = Linear(
            config.mlp.ffn_size, config.hidden_size, init_std=config.output_init_std, bias=config.linear_bias
        )

    def forward(self, x_BTD: Tensor, context: LayerContext | None = None) -> tuple[Tensor, None]:
        """(B, T, D) -> ((B, T, D), None); needs nothing of the context."""
        return self.down(self.activation(self.up(x_BTD))), None


class GatedMLP(nn.Module):
    """down(activation(gate(x)) up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = GATED_ACTIVATIONS[config.mlp.activation]
        self.gate = Linear(config.hidden_size, config.mlp.ffn_size, init_std=config.init_std, bias=config.linear_bias)
        self.up = Linear(config.hidden_size, config.mlp.ffn_size, init_std=config.init_std, bias=config.linear_bias)
        self.down = Linear(
            config.mlp.ffn_size, config.hidden_size, init_std=config.output_init_std, bias=config.linear_bias
        )

    def forward(self, x_BTD: Tensor, context: LayerContext | None = None) -> tuple[Tensor, None]:
        """(B, T, D) -> ((B, T, D), None); needs nothing of the context."""
        return self.down(self.activation(self.gate(x_BTD)) * self.up(x_BTD)), None


def build_mlp(config: ModelConfig, spec: LayerSpec) -> nn.Module:
    """The feed-forward layer that `config.mlp.activation` names."""
    return GatedMLP(config) if config.mlp.activation in GATED_ACTIVATIONS else MLP(config)


def check(config: ModelConfig) -> None:
    """Raises ValueError naming the key of `config.mlp` that a feed-forward layer cannot have."""
    if config.mlp.ffn_size < 1:
        raise ValueError(f"model.mlp.ffn_size={config.mlp.ffn_size} must be at least 1")
    known = (*PLAIN_ACTIVATIONS, *GATED_ACTIVATIONS)
    if config.mlp.activation not in known:
        raise ValueError(f"model.mlp.activation={config.mlp.activation!r} is not one of {', '.join(known)}")
