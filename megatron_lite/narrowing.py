"""Casting a weight to a smaller dtype, refusing what the smaller dtype cannot hold.

Rounding is what a cast is for. Two things are not rounding: a finite value that becomes infinite (fp16 ends at 65,504), and values that
become zero in such numbers that the tensor's scale is below the dtype's smallest number (fp16: 6e-8). A few small values always
become zero and are within the rounding of their neighbors, so only a share of them is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ZEROED = 0.01  # of a tensor's nonzero values


def narrow(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`; infinities and NaNs that it already holds stay.

    Raises ValueError naming the tensor and how many values would be lost.
    """
    cast = tensor.to(dtype)
    if cast is tensor or torch.finfo(dtype).bits > torch.finfo(tensor.dtype).bits:
        return cast
    short = str(dtype).removeprefix("torch.")
    overflown = int((tensor.isfinite() & ~cast.isfinite()).sum())
    if overflown:
        raise ValueError(
            f"{overflown} of {tensor.numel()} values of {name} do not fit {short}, which ends at {torch.finfo(dtype).max:g} (the largest "
            f"is {float(tensor[tensor.isfinite()].abs().max()):g}); choose bf16 or fp32"
        )
    zeroed = int(((tensor != 0) & (cast == 0)).sum())
    if zeroed > MAX_ZEROED * int((tensor != 0).sum()):
        raise ValueError(
            f"{zeroed} of {tensor.numel()} values of {name} become zero in {short}, whose smallest number is about "
            f"{torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps:g}; choose bf16 or fp32"
        )
    return cast
