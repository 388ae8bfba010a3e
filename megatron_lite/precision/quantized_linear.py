"""A linear layer whose three products take quantized operands, computed with torch on any device.

Only `product` of `models.linear.Linear` is overridden: names, shapes and communication stay. Output and gradients have the dtype of
their inputs (bf16); sums, and the bias that is added to them, are fp32.

Notable features:
- Backward keeps the codes of the input, 1 byte an element. Of the weight it keeps the weight itself, which an engine that shards
  gathers again, and quantizes that again: the same numbers, since a weight does not change in between. Where weights stay in memory
  their codes are kept for all micro-batches of a step (`Mode.weights`).
- Three rungs: `fp8`; `fp8_forward`, whose backward is in bf16 on the original numbers; `bf16`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.precision.formats import Quantized, largest_magnitude, product
from megatron_lite.precision.gathered import QuantizedWeight
from megatron_lite.precision.numerics import Observation
from megatron_lite.precision.quantizers import Pair, Quantizers

FP8, FP8_FORWARD, BF16 = RUNGS = ("fp8", "fp8_forward", "bf16")

# largest / amax x amax may end one rounding of fp32 above largest
_ROUNDING = 1 + 2.0**-20


@dataclass
class Mode:
    """What all quantized layers of a decoder share. weights: the quantized weights by layer, while they may be kept.

    multiply: the product, which torch.compile leaves out, for it reads and writes what layers share. (Marked here and not where it
    is defined: the mark imports torch's compiler, which takes half a second.)
    """

    rung: str = FP8
    observe: Callable[[Observation], None] | None = None
    weights: dict[str, Pair] | None = None
    multiply: Callable[..., Tensor] = field(default_factory=lambda: torch.compiler.disable(_product))


class QuantizedLinear(nn.Module):
    """Mixed in before a linear layer's class. path: its name in the decoder."""

    weight: Tensor
    quantizers: Quantizers
    mode: Mode
    path: str

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., K) -> (..., N)."""
        if self.mode.rung == BF16:
            return super().product(x, bias)  # type: ignore[misc]
        return self.mode.multiply(x, self.weight, bias, self)

    def quantize(self, operand: str, x: Tensor) -> Pair:
        """Both forms of an operand, a matrix."""
        pair = x.pair() if isinstance(x, QuantizedWeight) else getattr(self.quantizers, operand).pair(x)
        if self.mode.observe is not None:
            self.mode.observe(_observation(self.path, operand, x, pair[0]))
        return pair

    def quantized_weight(self, weight: Tensor) -> Pair:
        """Both forms of the weight, those of this step where it keeps them."""
        kept = self.mode.weights
        if kept is None:
            return self.quantize("weight", weight)
        if self.path not in kept:
            kept[self.path] = self.quantize("weight", weight)
        return kept[self.path]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, linear: QuantizedLinear) -> Tensor:
    return _Linear.apply(x, weight, bias, linear)


class _Linear(torch.autograd.Function):
    """y = x W^T + b with quantized operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, linear: QuantizedLinear) -> Tensor:
        x_MK = x.reshape(-1, x.shape[-1])
        x_rows, x_columns = linear.quantize("input", x_MK)
        y_MN = product(x_rows, linear.quantized_weight(weight)[0])
        ctx.linear, ctx.rung, ctx.shape = linear, linear.mode.rung, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        if ctx.rung == FP8:
            ctx.block = x_columns.block
            ctx.save_for_backward(x_columns.codes, x_columns.scale_inv, weight)
        else:
            ctx.save_for_backward(x_MK, weight)
        if bias is not None:
            y_MN = y_MN + bias
        return y_MN.to(x.dtype).view(*x.shape[:-1], y_MN.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        grad_MN = grad.reshape(-1, grad.shape[-1])
        dx = dw = db = None
        if ctx.rung == FP8:
            codes, scale_inv, weight = ctx.saved_tensors
            grad_rows, grad_columns = ctx.linear.quantize("grad_output", grad_MN)
            if ctx.needs_input_grad[0]:
                dx = product(grad_rows, ctx.linear.quantized_weight(weight)[1])
            if ctx.needs_input_grad[1]:
                dw = product(grad_columns, Quantized(codes, scale_inv, ctx.block))
        else:
            x_MK, weight = ctx.saved_tensors
            dx = grad_MN @ weight if ctx.needs_input_grad[0] else None
            dw = grad_MN.T @ x_MK if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[2]:
            db = grad_MN.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        dx = None if dx is None else dx.to(grad.dtype).view(ctx.shape)
        return dx, None if dw is None else dw.to(weight.dtype), db, None


@torch.no_grad()
def _observation(path: str, operand: str, x: Tensor, quantized: Quantized) -> Observation:
    largest = torch.finfo(quantized.codes.dtype).max * quantized.spread(quantized.scale_inv) * _ROUNDING
    beyond = (x.abs() > largest) | ~x.isfinite()
    vanished = (quantized.codes.float() == 0) & (x != 0)
    share = vanished.sum() / (x != 0).sum().clamp(min=1)
    return Observation(path, operand, largest_magnitude(x), beyond.float().mean(), share.float())
