"""Codes of a gathered weight as the tensors that Transformer Engine multiplies with (see `gathered.py`).

TE takes a weight that is quantized already as it is: it neither quantizes it nor records its maximum. For a product along the other
dimension it transposes the codes, and drops that copy after backward where the weights are sharded again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.precision.formats import Quantized
from megatron_lite.precision.gathered import QuantizedWeight


def as_transformer_engine(weight: QuantizedWeight, te: ModuleType, *, columnwise: bool) -> Tensor:
    """TE's tensor over the same codes; gradients go to `weight`. columnwise: TE makes the transposed copy in forward already."""

    def make(quantized: Quantized) -> Tensor:
        build = _per_tensor if quantized.block is None else _blocks
        return build(te, quantized, weight.dtype, columnwise)

    made: Tensor = _Conversion.apply(weight, make)
    return made


class _Conversion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: QuantizedWeight, make: Callable[[Quantized], Tensor]) -> Tensor:
        return make(weight.quantized)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _per_tensor(te: ModuleType, quantized: Quantized, dtype: torch.dtype, columnwise: bool) -> Tensor:
    codes = quantized.codes
    quantizer = te.Float8CurrentScalingQuantizer(_code(te, codes), codes.device, rowwise=True, columnwise=columnwise)
    made: Tensor = te.Float8Tensor(
        shape=codes.shape,
        dtype=dtype,
        data=codes.view(torch.uint8),
        fp8_scale_inv=quantized.scale_inv.reshape(1),
        fp8_dtype=quantizer.dtype,
        quantizer=quantizer,
        device=codes.device,
    )
    return made


def _blocks(te: ModuleType, quantized: Quantized, dtype: torch.dtype, columnwise: bool) -> Tensor:
    codes, scale_inv = quantized.codes, quantized.scale_inv
    quantizer = te.Float8BlockQuantizer(_code(te, codes), rowwise=True, columnwise=columnwise, block_scaling_dim=2)
    made: Tensor = te.Float8BlockwiseQTensor(
        shape=codes.shape,
        dtype=dtype,
        rowwise_data=codes.view(torch.uint8),
        rowwise_scale_inv=F.pad(scale_inv, (0, -scale_inv.shape[1] % 4)),  # as the products read them
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=quantizer.dtype,
        quantizer=quantizer,
        is_2D_scaled=True,
        device=codes.device,
    )
    return made


def _code(te: ModuleType, codes: Tensor) -> Any:
    return te.DType.kFloat8E4M3 if codes.dtype is torch.float8_e4m3fn else te.DType.kFloat8E5M2


@dataclass
class WeightHistory:
    """The scale and the running maximum that TE's delayed scaling keeps for a layer's weight, as `delayed.Histories` gives them."""

    linear: Any  # te.Linear

    @property
    def scale(self) -> Tensor:
        """(2 or more,): input, weight, ..."""
        scale: Tensor = self.linear.fp8_meta["scaling_fwd"].scale
        return scale

    def record(self, index: int, amax: Tensor) -> None:
        """Count a weight's largest number."""
        running = self.linear.fp8_meta["scaling_fwd"].amax_history[0, index]
        running.copy_(torch.maximum(running, amax))
