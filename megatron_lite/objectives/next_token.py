"""Next-token prediction: loss = - sum over counted tokens of log p(target | tokens before it)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_lite.models.decoder import Decoder
from megatron_lite.objectives.base import Loss, Objective, ObjectiveConfig
from megatron_lite.parallel.frozen import FrozenDecoder


@dataclass
class NextTokenConfig(ObjectiveConfig):
    """Has no settings."""

    def build(self, decoder: Decoder, teacher: FrozenDecoder | None = None) -> Objective:
        """See `ObjectiveConfig`."""
        return NextToken(decoder)


class NextToken(Objective):
    """Minimizes what every objective evaluates."""

    def loss(self, batch: dict[str, Tensor]) -> Loss:
        """See `Objective`."""
        return self.evaluate(batch)
