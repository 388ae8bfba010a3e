"""What the layers of one forward share: positions, documents, cache; and what one layer hands on to another.

Facts are integers. FSDP2's mixed precision casts every floating-point tensor among a layer's arguments to the compute dtype, also
those inside a dataclass: a table of cosines that is handed in arrives in bf16. A layer makes its own float tables from these
integers, and its attention mask from them and its own window. Keys and values of another layer are of the compute dtype anyway.

Shapes: B batch, T sequence, S keys, G KV groups, K head dim of queries and keys, V that of values.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_lite.models.cache import KeyValue, LayerCache


@dataclass(frozen=True)
class LayerContext:
    """Arguments beside x that a mixer may need.

    positions_BT: (B, T), or (1, T) when all rows share them, int64: each token's place in its document, from 0.
    documents_BT: (B, T) integers that rise from document to document; a token attends within its own. None: one document a row.
    prefix: the first tokens that belong to every document of the row (meta tokens), 0 if there are none among these tokens.
      Documents count their positions from there, and `documents_BT` gives them the number of the first document.
    cache: what this layer remembers of the tokens before, in generation.
    kv: keys and values of the layer that this one uses (`LayerSpec.kv_from`).
    """

    positions_BT: Tensor
    documents_BT: Tensor | None = None
    prefix: int = 0
    cache: LayerCache | None = None
    kv: KeyValue | None = None
