"""Output projection and loss in one function, in chunks of tokens, over a vocabulary that may be sharded.

A loss is a function of one chunk's logits that also gives its gradient (`ChunkLoss`); this file computes the logits of a
chunk after the other, sums the losses up and carries the gradients back to hidden states and output embedding.

Notable features:
- Tokens x vocabulary is never in memory, neither forward nor backward: at Nemotron-4's 4,096 tokens and a vocabulary of
  256,000 the fp32 logits alone would be 4.2 GB. The logits of one chunk of tokens are computed, reduced and discarded.
- The loss is a sum, so the gradient that arrives from above is one number. Both gradients are therefore computed in
  the forward pass, while a chunk's logits are at hand, and backward only scales them: every logit is computed once.
- bf16 inputs are multiplied in bf16; the loss and the weight's gradient are fp32, the gradient cast at the end.

Shapes: N tokens, C tokens of a chunk, D hidden, V local rows of the output embedding (the vocabulary's shard).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Memory for one chunk's fp32 logits. On a GPU a chunk must be large enough that reading and writing the fp32 weight
# gradient once a chunk costs less than the three matrix products; in a CPU's cache small chunks win (see chunk_size).
_CHUNK_BYTES_CPU = 8 * 2**20
_CHUNK_BYTES_GPU = 512 * 2**20
_CHUNK_TOKENS_LEAST = 128


@dataclass(frozen=True)
class VocabularyShard:
    """Which rows of the vocabulary this rank holds (`start..`), and with whom it holds the rest.

    Rows at a global index >= `vocab_size` are padding: their logits count as -inf and their gradient is zero.
    """

    vocab_size: int
    start: int = 0
    group: dist.ProcessGroup | None = None

    def fill_padding(self, value_CV: Tensor, filler: float = -torch.inf) -> Tensor:
        """`value_CV` with `filler` in the padding's columns, in place."""
        words = max(self.vocab_size - self.start, 0)
        if words < value_CV.shape[1]:
            value_CV[:, words:] = filler
        return value_CV

    def place(self, target_C: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """(whether each word is among the `rows` of this rank, its column (C, 1) there; any column where it is not)."""
        is_here_C = (target_C >= self.start) & (target_C < self.start + rows)
        return is_here_C, (target_C - self.start).clamp(0, rows - 1)[:, None]

    def maximum(self, value: Tensor) -> Tensor:
        """The elementwise maximum over the ranks that share the vocabulary, in place."""
        if self.group is not None:
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return value

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks that share the vocabulary, in place."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value


class ChunkLoss(Protocol):
    """The losses of a chunk of tokens from its logits."""

    def __call__(
        self, logits_CV: Tensor, rows: slice, *, want_gradient: bool
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """(losses of each token, (C,) each: what is minimized and what is reported beside it; d of the first / d logits).

        logits_CV: in fp32 and to be overwritten. rows: which of the N tokens these are. The values of masked tokens do not
        matter.
        """


def chunk_size(*, local_vocab: int, device: torch.device) -> int:
    """Tokens in a chunk, so that its fp32 logits take about 8 MiB on a CPU and 512 MiB on a GPU, but at least 128."""
    budget = _CHUNK_BYTES_CPU if device.type == "cpu" else _CHUNK_BYTES_GPU
    return max(_CHUNK_TOKENS_LEAST, budget // (4 * local_vocab))


def chunked_loss_sum(
    x_ND: Tensor, weight_VD: Tensor, mask_N: Tensor, *, loss: ChunkLoss, chunk_tokens: int | None = None
) -> tuple[Tensor, ...]:
    """The sums of the losses over the tokens where `mask_N` is true, scalars in fp32. Only the first has a gradient.

    Where the vocabulary is sharded, the losses are complete on every rank and so is the weight's gradient, but **the
    gradient of `x_ND` is this rank's partial sum**: the caller sums it over the ranks (`collectives.copy_in`, or
    `collectives.sequence_gather` under sequence parallelism; the tensor-parallel final norm does so).
    """
    chunk = chunk_tokens or chunk_size(local_vocab=weight_VD.shape[0], device=x_ND.device)
    # Asked here because inside an autograd.Function gradients are always switched off.
    wanted = (
        torch.is_grad_enabled() and x_ND.requires_grad,
        torch.is_grad_enabled() and weight_VD.requires_grad,
    )
    return _ChunkedLossSum.apply(x_ND, weight_VD, mask_N, loss, chunk, wanted)


class _ChunkedLossSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        mask_N: Tensor,
        loss: ChunkLoss,
        chunk: int,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, ...]:
        ctx.dtypes = x_ND.dtype, weight_VD.dtype
        weight_VD = weight_VD.to(x_ND.dtype)
        exact = torch.promote_types(x_ND.dtype, torch.float32)
        sums: list[Tensor] = []
        d_x_ND = torch.empty_like(x_ND) if wanted[0] else None
        d_weight_VD: Tensor | None = None
        masked_N = ~mask_N
        for begin in range(0, x_ND.shape[0], chunk):
            rows = slice(begin, begin + chunk)
            x_CD, masked_C = x_ND[rows], masked_N[rows]
            logits_CV = torch.mm(x_CD, weight_VD.t()).to(exact)
            losses, d_logits_CV = loss(logits_CV, rows, want_gradient=any(wanted))
            sums = sums or [x_ND.new_zeros((), dtype=exact) for _ in losses]
            for total, loss_C in zip(sums, losses):
                total += loss_C.masked_fill(masked_C, 0.0).sum()
            if d_logits_CV is None:
                continue
            # Masked on the narrow sides of both products: a pass over a chunk's logits costs V/D times as much.
            d_logits_CV = d_logits_CV.to(x_ND.dtype)
            if d_x_ND is not None:
                torch.mm(d_logits_CV, weight_VD, out=d_x_ND[rows]).masked_fill_(masked_C[:, None], 0.0)
            if wanted[1]:
                counted_CD = x_CD.masked_fill(masked_C[:, None], 0.0)
                d_weight_VD = _plus_product(d_weight_VD, d_logits_CV.t(), counted_CD, dtype=exact)
        ctx.save_for_backward(d_x_ND, d_weight_VD)
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_x_ND, d_weight_VD = ctx.saved_tensors
        d_x_dtype, d_weight_dtype = ctx.dtypes
        return (
            _scaled(d_x_ND, grad, d_x_dtype),
            _scaled(d_weight_VD, grad, d_weight_dtype),
            *[None] * 4,
        )


def _plus_product(total_VD: Tensor | None, left_VC: Tensor, right_CD: Tensor, *, dtype: torch.dtype) -> Tensor:
    """total + left @ right in `dtype`, which may be wider (fp32) than that of the factors (bf16). Adds to `total` in place; without
    one the product is the sum, and no zeros are written and read again."""
    if total_VD is not None and left_VC.dtype == dtype:
        return total_VD.addmm_(left_VC, right_CD)
    product_VD = torch.mm(left_VC, right_CD)
    return product_VD.to(dtype) if total_VD is None else total_VD.add_(product_VD)


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """gradient * factor, rounded once, without a wide copy in between."""
    if gradient is None:
        return None
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
