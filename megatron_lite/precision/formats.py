"""FP8 numbers: the two formats, casts, scales, and a product of two quantized matrices.

    E4M3   4 bits of exponent, 3 of mantissa: at most 448, finest step 2^-9, no infinity
    E5M2   5 bits of exponent, 2 of mantissa: at most 57344, finest step 2^-16
    (Micikevicius et al., arXiv 2209.05433)

A quantized tensor is codes and scales: value = code x scale_inv. Every operand of a product is stored with the dimension that is
summed over last, as tensor cores read it: (rows, contraction).

Notable features:
- Finite numbers beyond the largest one become the largest one, in both formats, before the cast: torch's own cast does that for E4M3
  only. What was not finite stays not finite (NaN in E4M3): an overflow in the bf16 computation is never hidden by a cast.
- Rounding is to nearest, ties to even: torch's cast.
- Products are summed in fp32.

Shapes: I, J rows of a product's operands, C what is summed over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """An FP8 format. infinity: what an infinite number becomes."""

    name: str
    dtype: torch.dtype
    infinity: float

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return torch.finfo(self.dtype).max


E4M3 = Format("E4M3", torch.float8_e4m3fn, float("nan"))
E5M2 = Format("E5M2", torch.float8_e5m2, float("inf"))


@dataclass(frozen=True)
class Quantized:
    """codes (I, C) in an FP8 format; scale_inv: a number, or one for each block of `block` rows and columns, fp32.

    The last blocks of rows and columns may be incomplete.
    """

    codes: Tensor
    scale_inv: Tensor
    block: tuple[int, int] | None = None

    def values(self) -> Tensor:
        """(I, C) fp32: what the codes stand for."""
        return self.codes.float() * self.spread(self.scale_inv)

    def spread(self, of_blocks: Tensor) -> Tensor:
        """A number for each block -> one for each element (broadcastable)."""
        if self.block is None:
            return of_blocks
        for dim, (size, length) in enumerate(zip(self.block, self.codes.shape)):
            if size > 1:
                of_blocks = of_blocks.repeat_interleave(size, dim).narrow(dim, 0, length)
        return of_blocks

    def transposed(self) -> Quantized:
        """The same codes and scales, (C, I)."""
        block = self.block and (self.block[1], self.block[0])
        return Quantized(self.codes.T, self.scale_inv.T if self.scale_inv.dim() else self.scale_inv, block)


def product(a: Quantized, b: Quantized) -> Tensor:
    """a (I, C) times b (J, C) transposed -> (I, J) fp32, summed in fp32. One scale a tensor is applied to the sums, as cuBLAS does."""
    if a.block is None and b.block is None:
        return (a.codes.float() @ b.codes.float().T) * (a.scale_inv * b.scale_inv)
    return a.values() @ b.values().T


def cast(x: Tensor, scale: Tensor, form: Format) -> Tensor:
    """The codes of x times `scale` (broadcastable)."""
    scaled = x.float() * scale
    saturated = scaled.clamp(-form.largest, form.largest)
    return torch.where(x.isinf(), scaled * form.infinity, saturated).to(form.dtype)


def scale_for(amax: Tensor, form: Format, *, power_of_two: bool, dtype: torch.dtype) -> Tensor:
    """The fp32 scale by which numbers of at most `amax` (fp32, any shape) fill the format's range: largest / amax.

    1 where amax is 0; the largest number of `dtype`, in which the tensor came, where the quotient overflows; 0 where amax is infinite, so
    that nothing of such a tensor comes out finite. Power of two: rounded down to one. (Transformer Engine's rule.)
    """
    scale = form.largest / amax
    scale = torch.where(scale.isinf(), torch.finfo(dtype).max, scale)
    if power_of_two:
        _, exponent = torch.frexp(scale)  # scale = m 2^exponent, 1/2 <= m < 1
        down = torch.ldexp(torch.ones_like(scale), exponent - 1)
        scale = torch.where(scale.isfinite() & (scale > 0), down, scale)
    return torch.where(amax == 0, 1.0, scale)


def largest_magnitude(x: Tensor) -> Tensor:
    """0-dim fp32 max |x|, 0 for an empty tensor; NaN where x has one."""
    return x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
