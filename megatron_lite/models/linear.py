"""The two layers that hold matrices: `Linear` and `Embedding`.

Like `torch.nn.Linear` and `torch.nn.Embedding`, with two differences: the constructor leaves the memory as
it is (a model is built on the meta device, sharded, materialized and only then initialized), and every module defines the
distributions of its parameters (`initial`), so that the initial values are the same at every layout.

Both take their sizes from the weight, never from a stored count: a tensor-parallel module only holds a smaller
weight.

Shapes: V vocabulary rows, D width of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.models.initialization import Constant, Distribution, Normal

T = TypeVar("T")


class Linear(nn.Module):
    """y = x W^T (+ b), with `weight` (out, in) and, with `bias`, `bias` (out,).

    `init_std` is the standard deviation of the initial weights. `valid_rows` is the number of rows that mean
    something when the rows are a padded vocabulary: the others start as zero.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        init_std: float,
        bias: bool = False,
        valid_rows: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.init_std = init_std
        self.valid_rows = valid_rows

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T (+ bias): the matrix product alone, which other arithmetic replaces."""
        return F.linear(x, self.weight, bias)

    def with_weight(self, function: Callable[[Tensor, Tensor], T], x: Tensor) -> T:
        """`function(x, weight)`, for a loss that reads the weight itself. An engine that shards the weight gathers it for this
        call, as it does for `forward`."""
        return function(x, self.weight)

    def initial(self) -> dict[str, Distribution]:
        """How each parameter starts: weights normal, bias zero."""
        distributions: dict[str, Distribution] = {"weight": Normal(self.init_std, valid_rows=self.valid_rows)}
        if self.bias is not None:
            distributions["bias"] = Constant(0.0)
        return distributions

    def extra_repr(self) -> str:
        """The local shape, for `print(model)`."""
        return f"weight={tuple(self.weight.shape)}, bias={self.bias is not None}"


class Embedding(nn.Module):
    """Row `tokens` of `weight` (V, D). `valid_rows` as in `Linear`."""

    kinds: ClassVar[dict[str, str]] = {"weight": "embedding"}

    def __init__(self, num_embeddings: int, width: int, *, init_std: float, valid_rows: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, width))
        self.init_std = init_std
        self.valid_rows = valid_rows

    def forward(self, tokens_BT: Tensor, *, begins: bool = True) -> Tensor:
        """(B, T) int64 -> (B, T, D). begins: whether these are the first tokens of their sequences, which makes no difference here."""
        return self.look_up(tokens_BT)

    def look_up(self, tokens: Tensor) -> Tensor:
        """(...) int64 -> (..., D)."""
        return F.embedding(tokens, self.weight)

    def initial(self) -> dict[str, Distribution]:
        """How the rows start."""
        return {"weight": Normal(self.init_std, valid_rows=self.valid_rows)}

    def extra_repr(self) -> str:
        """The local shape, for `print(model)`."""
        return f"weight={tuple(self.weight.shape)}"
