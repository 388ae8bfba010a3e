"""FP8 products on the meta device as Transformer Engine runs them: what is cast, multiplied, and kept for backward.

    forward     y = x W^T                       x is cast in rows and in columns; the columns wait for backward, 1 byte a number
    backward    dx = g W,  dW = g^T x           g is cast in rows and in columns

A weight that stays in memory for a step is cast once, and both forms stay as long as the model does: 2 bytes a number
(`_fp8_workspaces` of TE's modules). One that is sharded again after forward is cast in forward, and once more in backward. Both are what
`precision/transformer_engine.py` asks of TE 2.20. Not counted: scales (of blocks, 3 % of the codes).

TE's kernels are no operators of torch, so recompute cannot keep their outputs: they run again, in the mode selective too. Hence the two
operators here, which `recompute.py` does not know either.

Shapes: M tokens, K input features, N output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.quantization import linear_layers
from megatron_lite.parallel.reclass import reclass
from megatron_lite.precision.recipes import Fp8Config

CODES = 2  # bytes of a weight's two forms, for each of its numbers
META_ONLY = "what Transformer Engine runs is planned on the meta device and not computed"


class MetaFp8Linear(nn.Module):
    """Mixed in before a linear layer's class. keeps_weight: its codes are there already."""

    weight: Tensor
    keeps_weight: bool

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., K) -> (..., N)."""
        y = _Product.apply(x, self.weight, self.keeps_weight)
        return y if bias is None else y + bias


def use_fp8(decoder: Decoder, recipe: Fp8Config, *, keeps_weights: bool) -> None:
    """Make the linear layers that `recipe` means FP8, in place."""
    for path, is_fp8 in linear_layers(decoder, recipe).items():
        if is_fp8:
            reclass(decoder.get_submodule(path), MetaFp8Linear, keeps_weight=keeps_weights)


def fp8_numbers(layer: nn.Module) -> int:
    """Numbers of a layer's weights that are FP8."""
    return sum(m.weight.numel() for m in layer.modules() if isinstance(m, MetaFp8Linear))


@torch.library.custom_op("mlite::planned_cast", mutates_args=())
def cast(x: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of a matrix (R, S) in rows, and those in columns (S, R)."""
    raise NotImplementedError(META_ONLY)


@cast.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    return x.new_empty(rows, columns, dtype=torch.uint8), x.new_empty(columns, rows, dtype=torch.uint8)


@torch.library.custom_op("mlite::planned_product", mutates_args=())
def product(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """left (R, S) times right (T, S) transposed, both codes, in the dtype of `like`."""
    raise NotImplementedError(META_ONLY)


@product.register_fake
def _(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    return like.new_empty(left.shape[0], right.shape[0])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, keeps_weight: bool) -> Tensor:
        x_rows, x_columns = cast(x.reshape(-1, x.shape[-1]))
        weight_rows = _codes(weight, keeps_weight)[0]
        ctx.save_for_backward(x_columns, weight)
        ctx.keeps_weight, ctx.shape = keeps_weight, x.shape
        return product(x_rows, weight_rows, x).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x_columns, weight = ctx.saved_tensors
        grad_rows, grad_columns = cast(grad.reshape(-1, grad.shape[-1]))
        dx = product(grad_rows, _codes(weight, ctx.keeps_weight)[1], grad)
        return dx.view(ctx.shape), product(grad_columns, x_columns, weight), None


def _codes(weight: Tensor, kept: bool) -> tuple[Tensor, Tensor]:
    """Both forms of a weight; those that are kept have their place elsewhere."""
    return (weight, weight.t()) if kept else cast(weight)


CAST, PRODUCT = torch.ops.mlite.planned_cast, torch.ops.mlite.planned_product
