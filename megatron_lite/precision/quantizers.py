"""How a matrix becomes FP8: one scale a tensor, a tile, a block, or 32 elements.

A linear layer y = x W^T has three products, and each sums over another dimension:

    forward           y  (M, N) = x (M, K)      W (N, K)^T        over K
    input gradient    dx (M, K) = g (M, N)      W^T (K, N)^T      over N
    weight gradient   dW (N, K) = g^T (N, M)    x^T (K, M)^T      over M

So each of x, W and g is needed twice, along its last and along its first dimension, and a quantizer makes both from the original
numbers, never one from the other's codes. How many of the six are different tensors depends on the recipe:

    one scale a tensor (current, delayed)    3: transposing a matrix leaves its scale as it is
    blocks (DeepSeek-V3, arXiv 2412.19437)   5: x and g have tiles of 1 x 128 along the sum; a weight's 128 x 128 blocks serve both
    MX (OCP Microscaling 1.0)                6: 32 elements along the sum share a power of two

Shapes: M tokens, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.precision.formats import Format, Quantized, cast, largest_magnitude, scale_for

Pair = tuple[Quantized, Quantized]  # of a matrix (R, S): (R, S) for sums over S, and (S, R) for sums over R

TILE = 128
MX_BLOCK = 32


class Quantizer(Protocol):
    """Quantizes one operand of the layers that share it."""

    @property
    def format(self) -> Format:
        """What it makes."""

    def pair(self, x: Tensor, amax: Tensor | None = None) -> Pair:
        """Both quantized forms of the matrix x (R, S). amax: its largest magnitude, or that of the matrix of which x is some rows;
        None: it is not known yet. Quantizers with blocks do not need it."""


@dataclass(frozen=True)
class Quantizers:
    """The quantizers of a linear layer's operands."""

    input: Quantizer
    weight: Quantizer
    grad_output: Quantizer


@dataclass(frozen=True)
class CurrentScaling:
    """One scale a tensor, from the tensor itself. reduce: the maximum over the ranks that share the scale."""

    format: Format
    power_of_two: bool = False
    reduce: Callable[[Tensor], Tensor] | None = None

    def pair(self, x: Tensor, amax: Tensor | None = None) -> Pair:
        """See `Quantizer`."""
        if amax is None:
            amax = largest_magnitude(x)
            if self.reduce is not None:
                amax = self.reduce(amax)
        return with_scale(x, scale_for(amax, self.format, power_of_two=self.power_of_two, dtype=x.dtype), self.format)


def with_scale(x: Tensor, scale: Tensor, form: Format) -> Pair:
    """x with one given scale."""
    quantized = Quantized(cast(x, scale, form), scale.reciprocal())
    return quantized, quantized.transposed()


@dataclass(frozen=True)
class TileScaling:
    """One scale for each 1 x 128 elements along the sum (x and g of the block recipe)."""

    format: Format
    power_of_two: bool = True

    def pair(self, x: Tensor, amax: Tensor | None = None) -> Pair:
        """See `Quantizer`."""
        return self._rows(x), self._rows(x.T)

    def _rows(self, x: Tensor) -> Quantized:
        return in_blocks(x, (1, TILE), self.format, power_of_two=self.power_of_two)


@dataclass(frozen=True)
class BlockScaling:
    """One scale for each 128 x 128 elements (the weight of the block recipe)."""

    format: Format
    power_of_two: bool = True

    def pair(self, x: Tensor, amax: Tensor | None = None) -> Pair:
        """See `Quantizer`."""
        quantized = in_blocks(x, (TILE, TILE), self.format, power_of_two=self.power_of_two)
        return quantized, quantized.transposed()


@dataclass(frozen=True)
class MXScaling:
    """One power of two for each 32 elements along the sum."""

    format: Format

    def pair(self, x: Tensor, amax: Tensor | None = None) -> Pair:
        """See `Quantizer`."""
        return self._rows(x), self._rows(x.T)

    def _rows(self, x: Tensor) -> Quantized:
        block = (1, MX_BLOCK)
        scale_inv = power_of_two_above(block_amax(x, block) / self.format.largest)
        # 2^-127 stands for a block of zeros, or of numbers so small that its inverse would overflow: not scaled
        scale = torch.where(scale_inv == 2.0**-127, 1.0, scale_inv.reciprocal())
        return _quantized(x, block, self.format, scale, scale_inv)


def in_blocks(x: Tensor, block: tuple[int, int], form: Format, *, power_of_two: bool) -> Quantized:
    """x with one scale for each block."""
    scale = scale_for(block_amax(x, block), form, power_of_two=power_of_two, dtype=x.dtype)
    return _quantized(x, block, form, scale, scale.reciprocal())


def block_amax(x: Tensor, block: tuple[int, int]) -> Tensor:
    """(R, S) -> (blocks of rows, blocks of columns) fp32 max |x|; incomplete blocks count what they have."""
    rows, columns = (-length % size for length, size in zip(x.shape, block))
    padded = F.pad(x.abs(), (0, columns, 0, rows)) if rows or columns else x.abs()
    return padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).amax((1, 3)).float()


def power_of_two_above(x: Tensor) -> Tensor:
    """The least 2^e >= x with -127 <= e <= 127, in fp32 (an E8M0 number, rounded up as the OCP specification allows); NaN stays."""
    mantissa, exponent = torch.frexp(x)  # x = m 2^exponent, 1/2 <= m < 1
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    exponent = torch.where(x == 0, -127, torch.where(x.isinf(), 127, exponent)).clamp(-127, 127)
    return torch.where(x.isnan(), x, torch.ldexp(torch.ones_like(x), exponent))


def _quantized(x: Tensor, block: tuple[int, int], form: Format, scale: Tensor, scale_inv: Tensor) -> Quantized:
    return Quantized(cast(x, Quantized(x, scale, block).spread(scale), form), scale_inv, block)
