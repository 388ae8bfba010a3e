"""Meta tokens: learned vectors that stand before every sequence (Hymba, arXiv 2411.13676, section 2.3).

They go through all layers like the embeddings of words and leave after the final norm, so no loss counts them. The embedding puts
them in front: what cuts the sequence over ranks comes after it.

Shapes: B batch, T tokens, P prefix, D hidden.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from megatron_lite.models.initialization import Distribution, Normal
from megatron_lite.models.linear import Embedding


class PrefixedEmbedding(Embedding):
    """An embedding that puts `meta_tokens` (P, D) before the words of each sequence."""

    kinds: ClassVar[dict[str, str]] = {**Embedding.kinds, "meta_tokens": "state"}

    def __init__(
        self, num_embeddings: int, width: int, *, prefix: int, init_std: float, valid_rows: int | None = None
    ) -> None:
        super().__init__(num_embeddings, width, init_std=init_std, valid_rows=valid_rows)
        self.meta_tokens = nn.Parameter(torch.empty(prefix, width))

    def forward(self, tokens_BT: Tensor, *, begins: bool = True) -> Tensor:
        """(B, T) int64 -> (B, P + T, D), or (B, T, D) for tokens that continue their sequences."""
        x_BTD = super().forward(tokens_BT)
        if not begins:
            return x_BTD
        return torch.cat([self.prefix().expand(len(tokens_BT), -1, -1).to(x_BTD.dtype), x_BTD], dim=1)

    def prefix(self) -> Tensor:
        """(P, D)."""
        return self.meta_tokens

    def initial(self) -> dict[str, Distribution]:
        """Words as in `Embedding`; meta tokens with standard deviation 1, as in the authors' code."""
        return {**super().initial(), "meta_tokens": Normal(1.0)}
