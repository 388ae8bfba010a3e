"""Modules that compute in fp32 under an engine that keeps all weights in bf16: their forward sees the fp32 master weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module


class MasterWeights(nn.Module):
    """Mixed in before a module's own class. master_weights: fp32 values by parameter name, renewed by the engine."""

    master_weights: dict[str, Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, on the master weights; gradients arrive at the parameters."""
        shown = {name: _Shown.apply(value, self.master_weights[name]) for name, value in self.named_parameters()}
        with _reparametrize_module(self, shown):
            return super().forward(*args, **kwargs)


def compute_with_master_weights(module: nn.Module) -> MasterWeights:
    """`module`, in place made one with `master_weights` (still empty)."""
    original = type(module)
    module.__class__ = type(f"MasterWeights{original.__name__}", (MasterWeights, original), {})
    assert isinstance(module, MasterWeights)
    module.master_weights = {}
    return module


class _Shown(torch.autograd.Function):
    """The master weight in place of the parameter, whose gradient is rounded to its dtype."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, master_weight: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return master_weight.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None
