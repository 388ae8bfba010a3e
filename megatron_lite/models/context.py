"""What the layers of one forward share: positions, documents, cache; and what one layer hands on to another.

Facts are integers. FSDP2's mixed precision casts every floating-point tensor among a layer's arguments to the compute dtype, also
those inside a dataclass: a table of cosines that is handed in arrives in bf16. Keys and values of another layer are of the compute
dtype anyway. What layers make of the integers and share (rotary tables; attention masks, for all layers with the same window) is made
by the first of them and kept in `Once`, into which FSDP2 does not look.

Shapes: B batch, T sequence, S keys, G KV groups, K head dim of queries and keys, V that of values.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_lite.models.cache import KeyValue, LayerCache

T = TypeVar("T")


class Once:
    """What the layers of one forward make only once, also where they run again for recompute. Compiled layers make it again: what another
    graph has made cannot be seen while one is traced."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned when it was first called for `key`."""
        if torch.compiler.is_compiling():
            return make()
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


@dataclass(frozen=True)
class LayerContext:
    """Arguments beside x that a mixer may need.

    positions_BT: (B, T), or (1, T) when all rows share them, int64: each token's place in its document, from 0.
    documents_BT: (B, T) integers that rise from document to document; a token attends within its own. None: one document a row.
    prefix: the first tokens that belong to every document of the row (meta tokens), 0 if there are none among these tokens.
      Documents count their positions from there, and `documents_BT` gives them the number of the first document.
    cache: what this layer remembers of the tokens before, in generation.
    kv: keys and values of the layer that this one uses (`LayerSpec.kv_from`).
    once: what the layers of this forward share; None: nothing.
    """

    positions_BT: Tensor
    documents_BT: Tensor | None = None
    prefix: int = 0
    cache: LayerCache | None = None
    kv: KeyValue | None = None
    once: Once | None = None

    def shared(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, which depends on nothing but `key`, positions, documents and prefix. See `Once`."""
        return make() if self.once is None else self.once(key, make)
