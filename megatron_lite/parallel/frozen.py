"""A decoder that is read and not trained: the teacher of a distillation.

Notable features:
- Its parameters take no gradient and are kept in the dtype that it computes in (modules with `compute_in_fp32` stay in fp32):
  in bf16, 2 bytes for each parameter, divided by the tensor-parallel and the sharding data-parallel ranks.
- It is a module of its own beside what an engine trains, so that no engine, optimizer or checkpoint sees it. FSDP2 shards it
  in the mode `full` whatever shards the trained model: a layer is gathered for its forward, and nothing stays gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.sharded import fsdp_module
from megatron_lite.precision.dtypes import fp32_modules


class FrozenDecoder(nn.Module):
    """`decoder`, which may be on the meta device, in `dtype` and without gradients."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype) -> None:
        super().__init__()
        self.decoder = decoder.requires_grad_(False).to(dtype)
        for module in fp32_modules(decoder):
            module.float()
        self.eval()

    @torch.no_grad()
    def forward(
        self, tokens_BT: Tensor, documents_BT: Tensor | None = None, positions_BT: Tensor | None = None
    ) -> Tensor:
        """States (B, T, D) after the final norm."""
        return self.decoder.hidden(tokens_BT, documents_BT, positions_BT=positions_BT)

    @contextmanager
    def head_weight(self) -> Iterator[Tensor]:
        """Inside, this tensor-parallel rank's rows (V, D) of the output embedding, gathered over the data-parallel ranks.

        Call `forward` first. Afterwards nothing of the decoder is gathered any more.
        """
        # tied embeddings, like the final norm, are sharded with the module itself: see `FsdpConfig.distribute`
        holder = self if self.decoder.head is None else self.decoder.head
        if fsdp_module(holder):
            holder.unshard()
        yield self.decoder.head_weight
        for module in (self, self.decoder.embedding, self.decoder.head):
            if fsdp_module(module):
                module.reshard()
