"""What a model remembers of the tokens before, in generation: one `LayerCache` for each layer that needs one.

`Decoder.new_cache` makes it from the layer table. An attention layer keeps the keys and values of all tokens, a state-space layer a
state whose size does not depend on their number.

Shapes: B batch, G KV groups, T new tokens, S all tokens so far, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class LayerCache:
    """What one layer remembers. Each type of layer has its own kind."""


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


class Cache:
    """What all layers of a decoder remember of the first `length` tokens. layers: one entry for each, None: nothing."""

    def __init__(self, capacity: int, layers: Sequence[LayerCache | None]) -> None:
        self.capacity, self.layers = capacity, layers
        self.length = 0

    def check_room(self, new: int) -> None:
        """Raises ValueError when `new` more tokens exceed the capacity."""
        if self.length + new > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} tokens and {self.length + new} were asked for; ask for fewer new tokens"
            )
