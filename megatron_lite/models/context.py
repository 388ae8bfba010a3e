"""What the layers of one forward share: positions, documents, cache.

Integers only. FSDP2's mixed precision casts every floating-point tensor among a layer's arguments to the compute dtype, also those
inside a dataclass: a table of cosines that is handed in arrives in bf16. A layer makes its own float tables from these integers,
and its attention mask from them and its own window.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_lite.models.cache import LayerCache


@dataclass(frozen=True)
class LayerContext:
    """Arguments beside x that a mixer may need.

    positions_BT: (B, T), or (1, T) when all rows share them, int64: each token's place in its document, from 0.
    documents_BT: (B, T) integers that rise from document to document; a token attends within its own. None: one document a row.
    cache: what this layer remembers of the tokens before, in generation. starts_B: where in it each sequence of a batch begins.
    """

    positions_BT: Tensor
    documents_BT: Tensor | None = None
    cache: LayerCache | None = None
    starts_B: Tensor | None = None
