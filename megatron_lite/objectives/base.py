"""The base of objectives: modules around the decoder that map a batch to sums.

The engine divides by the number of counted tokens of the whole global batch, so objectives never compute a mean.

Shapes: B batch, T sequence, D hidden, N = B*T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.cross_entropy import cross_entropy_sum
from megatron_lite.parallel.frozen import FrozenDecoder
from megatron_lite.parallel.parallelize import vocabulary_shard


class Loss(NamedTuple):
    """Sums over the counted tokens of a batch, each a 0-dim tensor. (A tuple, which every engine can look into.)

    total: what is minimized. tokens: how many are counted. parts: what is logged beside it, by name and without gradient; the
    same names at every step.
    """

    total: Tensor
    tokens: Tensor
    parts: dict[str, Tensor]


class Objective(nn.Module):
    """The base of all objectives: override `loss`.

    In training mode a call gives what is minimized, in evaluation mode always the next token's cross-entropy, so that
    `val_loss` means the same in every run. The engine wraps the whole module: hidden states and the head's weight are whole
    inside a call only. What is trained is `decoder`.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.shard = vocabulary_shard(decoder)

    def forward(self, batch: dict[str, Tensor]) -> Loss:
        """A batch (tokens, targets, loss_mask, maybe documents and positions, each (B, T)) to its sums in fp32."""
        return self.loss(batch) if self.training else self.evaluate(batch)

    def loss(self, batch: dict[str, Tensor]) -> Loss:
        """What is minimized."""
        raise NotImplementedError

    def evaluate(self, batch: dict[str, Tensor]) -> Loss:
        """The cross-entropy of the next token."""
        return Loss(self.cross_entropy(self.hidden(batch), batch), torch.count_nonzero(batch["loss_mask"]), {})

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """The decoder's states (B, T, D) after the final norm."""
        return self.decoder.hidden(batch["tokens"], batch.get("documents"), positions_BT=batch.get("positions"))

    def cross_entropy(self, x_BTD: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """- sum over counted tokens of log p(target | x), 0-dim in fp32."""

        def loss(x_ND: Tensor, weight_VD: Tensor) -> Tensor:
            return cross_entropy_sum(
                x_ND,
                weight_VD,
                batch["targets"].flatten(),
                batch["loss_mask"].flatten(),
                shard=self.shard,
            )

        return self.decoder.with_head_weight(loss, x_BTD.flatten(0, 1))


class ObjectiveConfig:
    """The base of the `objective` sections: one dataclass an objective, with its own numbers as fields."""

    @property
    def teacher_path(self) -> str | None:
        """The weights of a second model that is read and not trained; None for an objective without one."""
        return None

    @property
    def teacher_dtype(self) -> torch.dtype | None:
        """In which it is kept and computes; None for that of the run."""
        return None

    def validate(self) -> None:
        """Raise ValueError naming the key if a value is invalid."""

    def build(self, decoder: Decoder, teacher: FrozenDecoder | None = None) -> Objective:
        """The objective around `decoder`, which may be on the meta device. teacher: what `teacher_path` names, assembled."""
        raise NotImplementedError
