"""Knowledge distillation from hidden states and output embeddings of student and teacher, in chunks of tokens.

With p = softmax(t / T) of the teacher's logits t and q = softmax(s / T) of the student's logits s, T the temperature,

    KL    = sum_v p_v (log p_v - log q_v)                     forward: KL(teacher || student)
    loss  = sum_n m_n (T^2 KL_n + c CE_n)                     Hinton et al. 2015, arXiv 1503.02531, section 2
    d T^2 KL / d s_v = T (q_v - p_v)

where CE is the student's cross-entropy of the next token at temperature 1. T^2 keeps the gradient's size as T grows; it is in
what is minimized and not in the KL that is reported. Minitron (arXiv 2407.14679, section 3) takes T = 1 and c = 0.

Notable features:
- Neither the student's nor the teacher's logits are ever whole (`chunked_loss`); the teacher may have another width.
- Vocabulary-parallel: of each token two maxima and a handful of sums travel, never the logits. With a = (t - max t) / T and
  b = (s - max s) / T,  KL = sum_v e^{a_v} (a_v - b_v) / sum_v e^{a_v} - log sum_v e^{a_v} + log sum_v e^{b_v}:  every sum is
  over the vocabulary, so that one all-reduce brings all of them, and equal logits give exactly 0.

Shapes: N tokens, C tokens of a chunk, D hidden, E the teacher's hidden, V local rows of the output embeddings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lite.parallel.chunked_loss import VocabularyShard, chunked_loss_sum


class Projection(NamedTuple):
    """What logits are made of: hidden states (N, D) and the rows (V, D) of the output embedding."""

    x_ND: Tensor
    weight_VD: Tensor


class DistillationSums(NamedTuple):
    """Sums over the counted tokens, 0-dim in fp32. total: what is minimized, the only one with a gradient."""

    total: Tensor
    kl: Tensor
    ce: Tensor
    teacher_ce: Tensor


class DistillationWeights(NamedTuple):
    """temperature: T. cross_entropy: c, what a token's cross-entropy counts beside its divergence."""

    temperature: float = 1.0
    cross_entropy: float = 0.0


def distillation_sum(
    student: Projection,
    teacher: Projection,
    targets_N: Tensor,
    mask_N: Tensor,
    *,
    weights: DistillationWeights,
    shard: VocabularyShard,
    chunk_tokens: int | None = None,
) -> DistillationSums:
    """The sums over the tokens where `mask_N` is true; targets of the others are never looked at.

    Both output embeddings hold the same rows of the same vocabulary (`shard`). The teacher gets no gradient; whose gradients
    are complete on a sharded vocabulary: see `chunked_loss_sum`.

    Raises ValueError when shapes disagree.
    """
    sizes = {len(student.x_ND), len(teacher.x_ND), len(targets_N), len(mask_N)}
    rows_held = {student.weight_VD.shape[0], teacher.weight_VD.shape[0]}
    if len(sizes) > 1 or len(rows_held) > 1:
        raise ValueError(
            f"tokens of student, teacher, targets and mask ({len(student.x_ND)}, {len(teacher.x_ND)}, {len(targets_N)}, "
            f"{len(mask_N)}) must be as many, and so must rows of the output embeddings {sorted(rows_held)}"
        )
    target_N = targets_N.masked_fill(~mask_N, 0)
    teacher_x_NE = teacher.x_ND.detach()
    teacher_weight_EV = teacher.weight_VD.detach().to(teacher_x_NE.dtype).t()

    def loss(logits_CV: Tensor, rows: slice, *, want_gradient: bool) -> tuple[tuple[Tensor, ...], Tensor | None]:
        teacher_CV = torch.mm(teacher_x_NE[rows], teacher_weight_EV).to(logits_CV.dtype)
        shifted = _Shifted(*_shift(logits_CV, teacher_CV, shard))
        losses, sums = _losses(shifted, target_N[rows], shard, weights)
        if not want_gradient:
            return losses, None
        return losses, _gradient(shifted, sums, target_N[rows], shard, weights)

    return DistillationSums(
        *chunked_loss_sum(student.x_ND, student.weight_VD, mask_N, loss=loss, chunk_tokens=chunk_tokens)
    )


class _Shifted(NamedTuple):
    """Logits less their maximum over the vocabulary; -inf in the padding's columns."""

    student_CV: Tensor
    teacher_CV: Tensor


class _Sums(NamedTuple):
    """Sums of exponentials over the whole vocabulary, (C,): at the temperature, and the student's at temperature 1."""

    student_C: Tensor
    teacher_C: Tensor
    plain_C: Tensor


def _shift(student_CV: Tensor, teacher_CV: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Both less their maxima, in place. One collective."""
    pair = [shard.fill_padding(logits_CV) for logits_CV in (student_CV, teacher_CV)]
    max_2C = shard.maximum(torch.stack([logits_CV.amax(dim=1) for logits_CV in pair]))
    return pair[0].sub_(max_2C[0][:, None]), pair[1].sub_(max_2C[1][:, None])


def _losses(
    logits: _Shifted, target_C: Tensor, shard: VocabularyShard, weights: DistillationWeights
) -> tuple[tuple[Tensor, ...], _Sums]:
    """(total, KL, CE, teacher's CE) of each token, and what the gradient needs again. One collective."""
    is_here_C, column_C1 = shard.place(target_C, logits.student_CV.shape[1])
    of_target = [t.gather(1, column_C1).squeeze(1).masked_fill(~is_here_C, 0.0) for t in logits]
    plain = [logits_CV.exp().sum(dim=1) for logits_CV in logits]
    T = weights.temperature
    warm = plain if T == 1 else [(logits_CV / T).exp().sum(dim=1) for logits_CV in logits]
    # (-inf) - (-inf) in the padding's columns is not a number
    difference_CV = shard.fill_padding(logits.teacher_CV - logits.student_CV, 0.0).div_(T)
    cross_C = difference_CV.mul_((logits.teacher_CV / T).exp_()).sum(dim=1)
    summed = shard.sum(torch.stack([*plain, *warm, *of_target, cross_C]))
    student, teacher, warm_student, warm_teacher, student_target, teacher_target, cross_C = summed
    kl_C = cross_C / warm_teacher - warm_teacher.log() + warm_student.log()
    ce_C, teacher_ce_C = student.log() - student_target, teacher.log() - teacher_target
    total_C = T**2 * kl_C + weights.cross_entropy * ce_C
    return (total_C, kl_C, ce_C, teacher_ce_C), _Sums(warm_student, warm_teacher, student)


def _gradient(
    logits: _Shifted, sums: _Sums, target_C: Tensor, shard: VocabularyShard, weights: DistillationWeights
) -> Tensor:
    """d total / d student's logits (C, V), zero in the padding's columns."""
    T = weights.temperature
    d_logits_CV = (logits.student_CV / T).exp_().div_(sums.student_C[:, None])
    d_logits_CV.sub_((logits.teacher_CV / T).exp_().div_(sums.teacher_C[:, None])).mul_(T)
    if weights.cross_entropy:
        is_here_C, column_C1 = shard.place(target_C, d_logits_CV.shape[1])
        d_logits_CV.add_(logits.student_CV.exp().div_(sums.plain_C[:, None]), alpha=weights.cross_entropy)
        d_logits_CV.scatter_add_(1, column_C1, -weights.cross_entropy * is_here_C[:, None].to(d_logits_CV.dtype))
    return d_logits_CV
