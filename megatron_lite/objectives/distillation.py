"""Knowledge distillation: the student is trained to give the teacher's distribution of the next token.

Minitron (arXiv 2407.14679, section 3) retrains a pruned model with nothing else: the forward divergence of the logits at
temperature 1, no cross-entropy, no intermediate states. `parallel/distillation_loss.py` has the formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.models.decoder import Decoder
from megatron_lite.objectives.base import Loss, Objective, ObjectiveConfig
from megatron_lite.parallel.distillation_loss import DistillationWeights, Projection, distillation_sum
from megatron_lite.parallel.frozen import FrozenDecoder
from megatron_lite.precision.dtypes import DTYPES


@dataclass
class DistillationConfig(ObjectiveConfig):
    """What the student learns from.

    teacher: a run, a checkpoint or a Hugging Face folder, of any width and family, with the tokenizer of the data.
    temperature: by which the logits of both are divided before the softmax.
    cross_entropy: what a token's cross-entropy counts beside the divergence; 0 leaves it out.
    teacher_precision: fp32 | bf16, in which the teacher is kept and computes; null takes that of the run.
    """

    teacher: str = "???"
    temperature: float = 1.0
    cross_entropy: float = 0.0
    teacher_precision: str | None = None

    @property
    def teacher_path(self) -> str:
        """See `ObjectiveConfig`."""
        return self.teacher

    @property
    def teacher_dtype(self) -> torch.dtype | None:
        """See `ObjectiveConfig`."""
        return DTYPES[self.teacher_precision] if self.teacher_precision else None

    def validate(self) -> None:
        """Raise ValueError naming the key if a value is invalid."""
        if not self.teacher.strip():
            raise ValueError(
                "objective.teacher is empty; give a run, a checkpoint or a Hugging Face folder, or objective=next_token"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"objective.temperature={self.temperature} must be above 0; 1 is Minitron's")
        if not (math.isfinite(self.cross_entropy) and self.cross_entropy >= 0):
            raise ValueError(f"objective.cross_entropy={self.cross_entropy} must be at least 0; 0 leaves it out")
        if self.teacher_precision not in (None, *DTYPES):
            raise ValueError(
                f"objective.teacher_precision={self.teacher_precision} is unknown; choose one of {', '.join(DTYPES)}, or null "
                "for that of the run"
            )

    def build(self, decoder: Decoder, teacher: FrozenDecoder | None = None) -> Objective:
        """See `ObjectiveConfig`."""
        assert teacher is not None, "the builder assembles what `teacher_path` names"
        return Distillation(decoder, teacher, DistillationWeights(self.temperature, self.cross_entropy))


class Distillation(Objective):
    """T^2 KL(teacher || student), and maybe cross-entropy; reports kl (without T^2), ce and teacher_ce."""

    def __init__(self, decoder: Decoder, teacher: FrozenDecoder, weights: DistillationWeights) -> None:
        super().__init__(decoder)
        self._teacher = (teacher,)  # in a tuple, where no engine finds it: it is not a part of what is trained
        self.weights = weights

    @property
    def teacher(self) -> FrozenDecoder:
        """The frozen model whose distribution is learned."""
        return self._teacher[0]

    def loss(self, batch: dict[str, Tensor]) -> Loss:
        """See `Objective`."""
        teacher_x_BTE = self.teacher(batch["tokens"], batch.get("documents"), batch.get("positions"))
        x_BTD = self.hidden(batch)

        def loss(x_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, ...]:
            with self.teacher.head_weight() as teacher_weight_VE:
                return distillation_sum(
                    Projection(x_ND, weight_VD),
                    Projection(teacher_x_BTE.flatten(0, 1), teacher_weight_VE),
                    batch["targets"].flatten(),
                    batch["loss_mask"].flatten(),
                    weights=self.weights,
                    shard=self.shard,
                )

        total, kl, ce, teacher_ce = self.decoder.with_head_weight(loss, x_BTD.flatten(0, 1))
        parts = {"kl": kl, "ce": ce, "teacher_ce": teacher_ce}
        return Loss(total, torch.count_nonzero(batch["loss_mask"]), parts)
