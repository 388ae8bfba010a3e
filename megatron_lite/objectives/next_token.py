"""Next-token prediction: the summed cross-entropy of the targets.

Shapes: B batch, T sequence, D hidden, V padded vocabulary, N = B*T.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.cross_entropy import cross_entropy_sum


class NextToken(nn.Module):
    """loss = - sum over counted tokens of log p(target | tokens before it)."""

    def __init__(self, decoder: Decoder, *, vocab_start: int = 0, group: dist.ProcessGroup | None = None) -> None:
        """vocab_start, group: where this rank's rows of the head begin, and who holds the others (tensor parallelism)."""
        super().__init__()
        self.decoder = decoder
        self.vocab_start, self.group = vocab_start, group

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A batch (tokens, targets, loss_mask, maybe documents, each (B, T)) to (summed loss in fp32, counted tokens)."""
        x_BTD = self.decoder.hidden(batch["tokens"], batch.get("documents"))
        mask_N = batch["loss_mask"].flatten()
        loss = cross_entropy_sum(
            x_BTD.flatten(0, 1),
            self.decoder.head_weight,
            batch["targets"].flatten(),
            mask_N,
            vocab_size=self.decoder.config.vocab_size,
            vocab_start=self.vocab_start,
            group=self.group,
        )
        return loss, torch.count_nonzero(mask_N)
