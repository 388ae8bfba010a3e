"""Rotary position embedding (RoFormer, arXiv 2104.09864), on the first R of the K dimensions of a head,
half-split.

For pair j of R/2, at position p:  angle = p base^(-2j/R),  (a, b) -> (a cos - b sin, b cos + a sin),  where
a is dimension j and b dimension j + R/2 ("rotate half"). Nemotron-4 rotates half of a head's dimensions
(fraction 0.5).

The tables are computed where they are used, in float32 (in float64 for a float64 model): nothing to store in a
checkpoint, no limit on the length, and positions may restart at documents.

Shapes: B batch (1 when all rows share their positions), T sequence, G KV groups, N heads in a group, K head
dim, R rotary dims, Z = R/2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(
    positions_BT: Tensor, rotary_dim: int, base: float, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, T, 1, 1, R/2) in `dtype`, on the positions' device."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=dtype, device=positions_BT.device) / rotary_dim
    angles_BTZ = positions_BT.to(dtype)[..., None] * (1.0 / base**exponents)
    angles = angles_BTZ[:, :, None, None, :]
    return angles.cos(), angles.sin()


def apply_rotary(x_BTGNK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first R dims of every head; computed in the tables' dtype, returned in x's dtype."""
    half = cos.shape[-1]
    a, b, rest = x_BTGNK.split([half, half, x_BTGNK.shape[-1] - 2 * half], dim=-1)
    rotated = [(a * cos - b * sin).to(x_BTGNK.dtype), (b * cos + a * sin).to(x_BTGNK.dtype)]
    return torch.cat([*rotated, rest], dim=-1)


def restarting_positions(documents_BT: Tensor, *, prefix: int = 0) -> Tensor:
    """Position of each token within its document: 0, 1, 2, and `prefix` again where `documents_BT` changes.

    prefix: the first tokens of a row, which come before each of its documents and have the number of the first.
    """
    index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    # the first document begins with the prefix, which the others have before their first token
    zero_BT = torch.where(begins_BT, (index_T - prefix).clamp(min=0), 0).cummax(dim=1).values
    return index_T - zero_BT
