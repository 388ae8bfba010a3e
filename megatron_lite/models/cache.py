"""Key-value cache for generation: what each attention layer remembers of the tokens before.

Memory is allocated when a layer first writes, in the dtype and with the number of KV groups it then sees, and
for the whole `capacity` at once, so that a step copies one token and nothing else.

Shapes: B batch, G KV groups, T new tokens, S all tokens so far, K head dim.
"""

from __future__ import annotations

from torch import Tensor


class LayerCache:
    """Keys and values of one attention layer."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    def append(self, key_BGTK: Tensor, value_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Adds T tokens, returns keys and values (B, G, S, K) of all tokens so far, as views.

        Raises ValueError when the capacity is exceeded.
        """
        batch, groups, new, head_dim = key_BGTK.shape
        end = self.length + new
        if end > self.capacity:
            raise ValueError(
                f"the key-value cache holds {self.capacity} tokens and {end} were asked for; ask for fewer new tokens"
            )
        if self._key is None or self._value is None:
            self._key = key_BGTK.new_empty(batch, groups, self.capacity, head_dim)
            self._value = value_BGTK.new_empty(batch, groups, self.capacity, value_BGTK.shape[-1])
        self._key[:, :, self.length : end] = key_BGTK
        self._value[:, :, self.length : end] = value_BGTK
        self.length = end
        return self._key[:, :, :end], self._value[:, :, :end]


class KeyValueCache:
    """One `LayerCache` for every layer that asks for it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._layers: dict[int, LayerCache] = {}

    def layer(self, index: int) -> LayerCache:
        """The cache of residual layer `index`."""
        return self._layers.setdefault(index, LayerCache(self.capacity))

    @property
    def length(self) -> int:
        """Number of tokens seen so far (0 in a model without attention, which has no use for it)."""
        return max((layer.length for layer in self._layers.values()), default=0)
