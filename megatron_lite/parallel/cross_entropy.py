"""Cross-entropy of the next token, from hidden states and output embedding, in chunks of tokens.

For hidden state x_n and target t_n,  loss = sum_n m_n (log sum_v exp(x_n . w_v) - x_n . w_{t_n}),  and
d loss / d logit_nv = m_n (softmax(logit_n)_v - [v = t_n]).

Vocabulary-parallel (Megatron-LM, Shoeybi et al. 2019, section 3): each rank holds consecutive rows of the weight; a
maximum, a sum of exponentials and the target's logit travel, three numbers a token, never the logits. The chunks are those
of `chunked_loss`.

Shapes: N tokens, C tokens of a chunk, D hidden, V local rows of the output embedding (the vocabulary's shard).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lite.parallel.chunked_loss import VocabularyShard, chunked_loss_sum


def cross_entropy_sum(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    mask_N: Tensor,
    *,
    shard: VocabularyShard,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Sum of the losses of the tokens where `mask_N` is true: a scalar in fp32 (in nats, not divided by anything).

    `targets_N` are global word indices; those of masked tokens are never looked at (-100 is fine). `weight_VD` holds the rows
    that `shard` describes. Where it is a part of the vocabulary, all ranks pass the same tokens; `chunked_loss_sum` says
    which gradients are complete then.

    Raises ValueError when shapes disagree.
    """
    if x_ND.shape[0] != targets_N.shape[0] or x_ND.shape[0] != mask_N.shape[0] or x_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden states {tuple(x_ND.shape)}, output embedding {tuple(weight_VD.shape)}, targets "
            f"{tuple(targets_N.shape)} and mask {tuple(mask_N.shape)} do not fit: want (N, D), (V, D), (N,), (N,)"
        )
    target_N = targets_N.masked_fill(~mask_N, 0)

    def loss(logits_CV: Tensor, rows: slice, *, want_gradient: bool) -> tuple[tuple[Tensor, ...], Tensor | None]:
        return _chunk_loss(logits_CV, target_N[rows], shard, want_gradient=want_gradient)

    return chunked_loss_sum(x_ND, weight_VD, mask_N, loss=loss, chunk_tokens=chunk_tokens)[0]


def _chunk_loss(
    logits_CV: Tensor, target_C: Tensor, shard: VocabularyShard, *, want_gradient: bool
) -> tuple[tuple[Tensor], Tensor | None]:
    """Loss of each token of a chunk and d loss / d logit; overwrites `logits_CV`."""
    if shard.group is None:
        return _whole_chunk_loss(shard.fill_padding(logits_CV), target_C, want_gradient=want_gradient)
    max_C = shard.maximum(shard.fill_padding(logits_CV).amax(dim=1))
    logits_CV.sub_(max_C[:, None])

    is_here_C, column_C1 = shard.place(target_C, logits_CV.shape[1])
    target_logit_C = logits_CV.gather(1, column_C1).squeeze(1).masked_fill(~is_here_C, 0.0)
    weights_CV = logits_CV.exp_()
    sums_2C = shard.sum(torch.stack([weights_CV.sum(dim=1), target_logit_C]))
    loss_C = sums_2C[0].log() - sums_2C[1]
    if not want_gradient:
        return (loss_C,), None
    d_logits_CV = weights_CV.div_(sums_2C[0][:, None])
    d_logits_CV.scatter_add_(1, column_C1, -is_here_C[:, None].to(d_logits_CV.dtype))
    return (loss_C,), d_logits_CV


def _whole_chunk_loss(
    logits_CV: Tensor, target_C: Tensor, *, want_gradient: bool
) -> tuple[tuple[Tensor], Tensor | None]:
    """`_chunk_loss` where no other rank has words: torch's log-softmax works row by row, in the cache, and its exponential is the
    gradient: half of the passes over a chunk's logits. Its kernels read a row before they write it, so `out` may be the input."""
    column_C1 = target_C[:, None]
    log_p_CV = torch.log_softmax(logits_CV, dim=1, out=logits_CV)
    loss_C = -log_p_CV.gather(1, column_C1).squeeze(1)
    if not want_gradient:
        return (loss_C,), None
    return (loss_C,), log_p_CV.exp_().scatter_add_(1, column_C1, log_p_CV.new_full(column_C1.shape, -1.0))
