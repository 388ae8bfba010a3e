"""Which keys a query sees, from positions and documents: as a dense mask, and as the function that FlexAttention asks.

A query sees the tokens of its own document up to itself, and the prefix of all documents (meta tokens). Positions rise within a
document, so they say what comes before. With a window it sees of these only the tokens at most `window` positions before it, and
the first `always_visible`.

Shapes: B batch (1 where all rows are alike), T queries, S keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.models.cache import KeyValue
from megatron_lite.models.context import LayerContext


@dataclass(frozen=True)
class Visibility:
    """The rule of one layer. window: positions that a query looks back, None = all. always_visible: the first positions, for all."""

    window: int | None = None
    always_visible: int = 0

    def shows(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether a query at position `query` sees a key of its document at position `key`, bool; the two broadcast."""
        seen = query >= key
        if self.window is not None:
            near = query - key <= self.window
            seen = seen & (near | (key < self.always_visible) if self.always_visible else near)
        return seen

    def hides_some_of(self, keys: int) -> bool:
        """Whether the last of `keys` tokens of one document does not see all of them."""
        return self.window is not None and keys > self.always_visible + self.window + 1


def dense_mask(context: LayerContext, kv: KeyValue, visibility: Visibility) -> Tensor | None:
    """(B, 1, T, S) bool, True = attend. None: causal, or a single query that sees all keys."""
    positions_BT, keys = context.positions_BT, kv.key_BGSK.shape[2]
    if context.documents_BT is not None:
        # half as many bytes to compare
        return training_mask(context.documents_BT.int(), positions_BT.int(), visibility, prefix=context.prefix)
    if len(positions_BT) == 1 and not visibility.hides_some_of(keys):
        in_order = kv.positions_BS is None and positions_BT.shape[1] == keys
        if in_order or positions_BT.shape[1] == 1:
            return None
    keys_BS = kv.positions_BS
    if keys_BS is None:
        keys_BS = torch.arange(keys, device=positions_BT.device)[None]
    seen_BTS = visibility.shows(positions_BT[:, :, None], keys_BS[:, None, :])
    if kv.positions_BS is not None:
        seen_BTS = seen_BTS & (keys_BS >= 0)[:, None, :]
    return seen_BTS[:, None]


def training_mask(
    documents_BT: Tensor | None,
    positions_BT: Tensor,
    visibility: Visibility,
    *,
    prefix: int,
    queries: slice = slice(None),
    keys: Tensor | None = None,
) -> Tensor:
    """(B, 1, T, S) bool for queries and keys that are tokens of the same sequences: all, or the `queries` and the indices `keys`."""
    key_positions_BS = positions_BT if keys is None else positions_BT[:, keys]
    seen_BTS = visibility.shows(positions_BT[:, queries, None], key_positions_BS[:, None, :])
    if documents_BT is not None:
        key_documents_BS = documents_BT if keys is None else documents_BT[:, keys]
        own_BTS = documents_BT[:, queries, None] == key_documents_BS[:, None, :]
        if prefix:
            index_S = torch.arange(positions_BT.shape[1], device=positions_BT.device) if keys is None else keys
            own_BTS |= index_S < prefix
        seen_BTS &= own_BTS
    return seen_BTS[:, None]


def mask_function(context: LayerContext, visibility: Visibility) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(row, head, query, key) -> whether the query sees the key, for `torch.nn.attention.flex_attention.create_block_mask`; all
    four are 0-dim integers. Queries and keys are tokens of the same sequences."""
    positions_BT, documents_BT, prefix = context.positions_BT, context.documents_BT, context.prefix
    shared = len(positions_BT) == 1

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = row * 0 if shared else row
        seen = visibility.shows(positions_BT[place, query], positions_BT[place, key])
        if documents_BT is None:
            return seen
        return seen & ((documents_BT[row, query] == documents_BT[row, key]) | (key < prefix))

    return sees
