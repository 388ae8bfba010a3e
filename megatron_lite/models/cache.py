"""The cache of previous tokens in generation: one `LayerCache` for each layer that needs one.

`Decoder.new_cache` makes it from the layer table. An attention layer keeps the keys and values of all tokens, a state-space layer a
state whose size does not depend on their number.

Shapes: B batch, G KV groups, T new tokens, S all tokens so far, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LayerCache:
    """The cache of one layer. Each layer type has its own subclass."""

    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        raise NotImplementedError

    @classmethod
    def batch(cls, caches: Sequence[LayerCache], lengths: Sequence[int], capacity: int) -> LayerCache:
        """The caches of sequences of different `lengths` as one of a batch: every sequence's last token in the same place."""
        raise NotImplementedError


class KeyValueCache(LayerCache):
    """Keys and values of one attention layer.

    Memory is allocated at the first call, in the dtype and with the number of KV groups it then sees, and for the whole `capacity`
    at once, so that a step copies one token and nothing else.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    def append(self, key_BGTK: Tensor, value_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Adds T tokens, returns keys and values (B, G, S, K) of all tokens so far, as views."""
        batch, groups, new, head_dim = key_BGTK.shape
        end = self.length + new
        if self._key is None or self._value is None:
            self._key = key_BGTK.new_empty(batch, groups, self.capacity, head_dim)
            self._value = value_BGTK.new_empty(batch, groups, self.capacity, value_BGTK.shape[-1])
        self._key[:, :, self.length : end] = key_BGTK
        self._value[:, :, self.length : end] = value_BGTK
        self.length = end
        return self._key[:, :, :end], self._value[:, :, :end]

    def nbytes(self) -> int:
        """See `LayerCache`: of the whole capacity."""
        return sum(tensor.nbytes for tensor in (self._key, self._value) if tensor is not None)

    @classmethod
    def batch(cls, caches: Sequence[LayerCache], lengths: Sequence[int], capacity: int) -> KeyValueCache:
        """See `LayerCache`. What is before a shorter sequence is zero and masked out."""
        made = cls(capacity)
        made.length = max(lengths)
        keys, values = ([getattr(cache, name) for cache in caches] for name in ("_key", "_value"))
        made._key, made._value = (_right_aligned(rows, lengths, capacity) for rows in (keys, values))
        return made


def _right_aligned(rows: Sequence[Tensor], lengths: Sequence[int], capacity: int) -> Tensor:
    _, groups, _, width = rows[0].shape
    made = rows[0].new_zeros(len(rows), groups, capacity, width)
    for row, (of_row, length) in enumerate(zip(rows, lengths)):
        made[row, :, max(lengths) - length : max(lengths)] = of_row[0, :, :length]
    return made


class Cache:
    """The caches of all layers of a decoder. layers: one entry for each layer; None if it needs none.

    length: how many tokens were seen; of the longest sequence of a batch. starts_B: where each sequence of a batch begins; None: all at 0.
    """

    def __init__(self, capacity: int, layers: Sequence[LayerCache | None]) -> None:
        self.capacity, self.layers = capacity, layers
        self.length = 0
        self.starts_B: Tensor | None = None

    def nbytes(self) -> int:
        """Bytes of memory that all layers take."""
        return sum(layer.nbytes() for layer in self.layers if layer is not None)

    def check_room(self, new: int) -> None:
        """Raises ValueError when `new` more tokens exceed the capacity."""
        if self.length + new > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} tokens and {self.length + new} were asked for; ask for fewer new tokens"
            )


def batch(caches: Sequence[Cache], *, capacity: int, device: torch.device) -> Cache:
    """The caches of single sequences as that of a batch, whose last tokens are in the same place: no padding token is ever computed."""
    lengths = [cache.length for cache in caches]
    layers = [
        None if of_layer[0] is None else type(of_layer[0]).batch(of_layer, lengths, capacity)
        for of_layer in zip(*(cache.layers for cache in caches))
    ]
    made = Cache(capacity, layers)
    made.length = max(lengths)
    made.starts_B = torch.tensor([made.length - length for length in lengths], device=device)
    return made
