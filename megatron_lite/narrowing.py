"""Casting a weight to a smaller dtype, with an error if that dtype cannot represent its values.

Rounding is expected. Two cases are errors: a finite value that becomes infinite (the largest fp16 value is 65,504), and so
many values that become zero that the scale of the tensor must be below the dtype's smallest number (fp16: 6e-8). A few small
values always become zero, within the rounding error of their neighbors, so zeros are only an error above a certain share.
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
