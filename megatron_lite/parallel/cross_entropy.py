"""Output projection and cross-entropy in one function, in chunks of tokens, over a vocabulary that may be sharded.

For hidden state x_n and target t_n,  loss = sum_n m_n (log sum_v exp(x_n . w_v) - x_n . w_{t_n}),  and
d loss / d logit_nv = m_n (softmax(logit_n)_v - [v = t_n]).

Notable features:
- Tokens x vocabulary is never in memory, neither forward nor backward: at Nemotron-4's 4,096 tokens and a vocabulary of
  256,000 the fp32 logits alone would be 4.2 GB. The logits of one chunk of tokens are computed, reduced and discarded.
- The loss is a sum, so the gradient that arrives from above is one number. Both gradients are therefore computed in
  the forward pass, while a chunk's logits are at hand, and backward only scales them: every logit is computed once.
- Vocabulary-parallel (Megatron-LM, Shoeybi et al. 2019, section 3): each rank holds rows `vocab_start..` of the
  weight; a maximum, a sum of exponentials and the target's logit travel, three numbers a token, never the logits.
- bf16 inputs are multiplied in bf16; softmax, loss and the weight's gradient are fp32, the gradient cast at the end.

Shapes: N tokens, C tokens of a chunk, D hidden, V local rows of the output embedding (the vocabulary's shard).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Memory for one chunk's fp32 logits. On a GPU a chunk must be large enough that reading and writing the fp32 weight
# gradient once a chunk costs less than the three matrix products; in a CPU's cache small chunks win (see chunk_size).
_CHUNK_BYTES_CPU = 8 * 2**20
_CHUNK_BYTES_GPU = 512 * 2**20
_CHUNK_TOKENS_LEAST = 128


def chunk_size(*, local_vocab: int, device: torch.device) -> int:
    """Tokens in a chunk, so that its fp32 logits take about 8 MiB on a CPU and 512 MiB on a GPU, but at least 128."""
    budget = _CHUNK_BYTES_CPU if device.type == "cpu" else _CHUNK_BYTES_GPU
    return max(_CHUNK_TOKENS_LEAST, budget // (4 * local_vocab))


def cross_entropy_sum(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    mask_N: Tensor,
    *,
    vocab_size: int,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Sum of the losses of the tokens where `mask_N` is true: a scalar in fp32 (in nats, not divided by anything).

    `targets_N` are global word indices; those of masked tokens are never looked at (-100 is fine). Rows of the weight
    at a global index >= `vocab_size` are padding: their logits count as -inf and their gradient is zero.

    With `group`, the weight holds rows `vocab_start..` of the global weight and all ranks pass the same tokens. The
    loss is complete on every rank and so is the weight's gradient, but **the gradient of `x_ND` is this rank's partial
    sum**: the caller sums it over `group` (`collectives.copy_in`, or `collectives.sequence_gather` under
    sequence parallelism; the tensor-parallel final norm does so).

    Raises ValueError when shapes disagree.
    """
    if x_ND.shape[0] != targets_N.shape[0] or x_ND.shape[0] != mask_N.shape[0] or x_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden states {tuple(x_ND.shape)}, output embedding {tuple(weight_VD.shape)}, targets "
            f"{tuple(targets_N.shape)} and mask {tuple(mask_N.shape)} do not fit: want (N, D), (V, D), (N,), (N,)"
        )
    shard = _Shard(vocab_size=vocab_size, start=vocab_start, group=group)
    chunk = chunk_tokens or chunk_size(local_vocab=weight_VD.shape[0], device=x_ND.device)
    # Asked here because inside an autograd.Function gradients are always switched off.
    wanted = (
        torch.is_grad_enabled() and x_ND.requires_grad,
        torch.is_grad_enabled() and weight_VD.requires_grad,
    )
    return _CrossEntropySum.apply(x_ND, weight_VD, targets_N, mask_N, shard, chunk, wanted)


@dataclass(frozen=True)
class _Shard:
    """Which part of the vocabulary this rank holds, and with whom it holds the rest."""

    vocab_size: int
    start: int
    group: dist.ProcessGroup | None


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        mask_N: Tensor,
        shard: _Shard,
        chunk: int,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        ctx.dtypes = x_ND.dtype, weight_VD.dtype
        weight_VD = weight_VD.to(x_ND.dtype)
        exact = torch.promote_types(x_ND.dtype, torch.float32)
        loss = x_ND.new_zeros((), dtype=exact)
        d_x_ND = torch.empty_like(x_ND) if wanted[0] else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=exact) if wanted[1] else None
        for begin in range(0, x_ND.shape[0], chunk):
            rows = slice(begin, begin + chunk)
            x_CD, mask_C = x_ND[rows], mask_N[rows]
            target_C = targets_N[rows].masked_fill(~mask_C, 0)
            logits_CV = torch.mm(x_CD, weight_VD.t()).to(exact)
            loss_C, d_logits_CV = _chunk_loss(logits_CV, target_C, shard, want_gradient=any(wanted))
            loss += loss_C.masked_fill(~mask_C, 0.0).sum()
            if d_logits_CV is None:
                continue
            d_logits_CV = d_logits_CV.masked_fill_(~mask_C[:, None], 0.0).to(x_ND.dtype)
            if d_x_ND is not None:
                torch.mm(d_logits_CV, weight_VD, out=d_x_ND[rows])
            if d_weight_VD is not None:
                _accumulate(d_weight_VD, d_logits_CV.t(), x_CD)
        ctx.save_for_backward(d_x_ND, d_weight_VD)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_x_ND, d_weight_VD = ctx.saved_tensors
        d_x_dtype, d_weight_dtype = ctx.dtypes
        return (
            _scaled(d_x_ND, grad, d_x_dtype),
            _scaled(d_weight_VD, grad, d_weight_dtype),
            *[None] * 5,
        )


def _chunk_loss(
    logits_CV: Tensor, target_C: Tensor, shard: _Shard, *, want_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss of each token of a chunk and d loss / d logit; overwrites `logits_CV`."""
    local_vocab = logits_CV.shape[1]
    first_pad = min(max(shard.vocab_size - shard.start, 0), local_vocab)
    logits_CV[:, first_pad:] = -torch.inf
    max_C = logits_CV.amax(dim=1)
    if shard.group is not None:
        dist.all_reduce(max_C, op=dist.ReduceOp.MAX, group=shard.group)
    logits_CV.sub_(max_C[:, None])

    is_here_C = (target_C >= shard.start) & (target_C < shard.start + local_vocab)
    column_C1 = (target_C - shard.start).clamp(0, local_vocab - 1)[:, None]
    target_logit_C = logits_CV.gather(1, column_C1).squeeze(1).masked_fill(~is_here_C, 0.0)
    weights_CV = logits_CV.exp_()
    sums_2C = torch.stack([weights_CV.sum(dim=1), target_logit_C])
    if shard.group is not None:
        dist.all_reduce(sums_2C, group=shard.group)
    loss_C = sums_2C[0].log() - sums_2C[1]
    if not want_gradient:
        return loss_C, None
    d_logits_CV = weights_CV.div_(sums_2C[0][:, None])
    d_logits_CV.scatter_add_(1, column_C1, -is_here_C[:, None].to(d_logits_CV.dtype))
    return loss_C, d_logits_CV


def _accumulate(total_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """total += left @ right, where only `total` may be wider (fp32) than the factors (bf16)."""
    if left_VC.dtype == total_VD.dtype:
        total_VD.addmm_(left_VC, right_CD)
    else:
        total_VD += torch.mm(left_VC, right_CD)


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """gradient * factor, rounded once, without a wide copy in between."""
    if gradient is None:
        return None
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
