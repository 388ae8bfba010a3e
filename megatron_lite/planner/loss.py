"""The loss of a job as a function of states and output embedding, on a device without memory: cross-entropy, or a distillation's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.chunked_loss import VocabularyShard
from megatron_lite.parallel.cross_entropy import cross_entropy_sum
from megatron_lite.parallel.distillation_loss import Projection, distillation_sum
from megatron_lite.planner.job import Job


def loss_of(job: Job, decoder: Decoder, targets_N: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """(x (N, D), weight (V, D)) -> the sum of the losses. What travels between ranks, a few numbers a token, does not here."""
    mask_N, shard = torch.empty_like(targets_N, dtype=torch.bool), VocabularyShard(decoder.config.vocab_size)

    def cross_entropy(x_ND: Tensor, weight_VD: Tensor) -> Tensor:
        return cross_entropy_sum(x_ND, weight_VD, targets_N, mask_N, shard=shard)

    if job.teacher is None:
        return cross_entropy
    teacher = job.teacher
    shape, width = (len(targets_N), decoder.head_weight.shape[0]), teacher.model.hidden_size
    theirs = Projection(*(torch.empty(rows, width, dtype=teacher.dtype, device=targets_N.device) for rows in shape))

    def distillation(x_ND: Tensor, weight_VD: Tensor) -> Tensor:
        ours = Projection(x_ND, weight_VD)
        return distillation_sum(ours, theirs, targets_N, mask_N, weights=teacher.weights, shard=shard).total

    return distillation
