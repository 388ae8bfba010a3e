"""The cache of previous tokens in generation: one `LayerCache` for each layer that needs one.

`Decoder.new_cache` makes it from the layer table. An attention layer keeps the keys and values of the tokens that a later query can
see: all of them, or with a window its last ones, in a ring. A state-space layer keeps a state whose size does not depend on the
number of tokens. A layer that uses another one's keys and values keeps none.

Shapes: B batch, G KV groups, T new tokens, S keys, K head dim of queries and keys, V that of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LayerCache:
    """The cache of one layer. Each layer type has its own subclass."""

    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        raise NotImplementedError

    @classmethod
    def batch(cls, caches: Sequence[LayerCache], capacity: int) -> LayerCache:
        """The caches of single sequences of different lengths as one of a batch, for `capacity` tokens."""
        raise NotImplementedError


class KeyValue(NamedTuple):
    """Keys and values of S tokens, keys already rotated.

    positions_BS: (B or 1, S), the place of each token in its sequence; below 0: no token. None: the tokens are in order, and the
      last ones are those whose queries attend.
    """

    key_BGSK: Tensor
    value_BGSV: Tensor
    positions_BS: Tensor | None = None


class KeyValueCache(LayerCache):
    """Keys and values of one attention layer, of at most `capacity` tokens.

    window, always_visible: no query looks further back than `window` tokens, but the first `always_visible` are seen by all; None:
    all are kept. The token at position p is in slot p; where slots are too few, the slots after the first `always_visible` are a
    ring of window + 1, in which a token takes the place of the one that its query no longer sees.

    Memory is allocated at the first call, in the dtype and with the number of KV groups it then sees, and for all slots at once, so
    that a step copies one token and nothing else.
    """

    def __init__(self, capacity: int, *, window: int | None = None, always_visible: int = 0) -> None:
        self.length = 0  # of the longest sequence of a batch
        self.window, self.always_visible = window, always_visible
        self.slots = capacity if window is None else min(capacity, always_visible + window + 1)
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    def append(self, key_BGTK: Tensor, value_BGTV: Tensor, positions_BT: Tensor) -> KeyValue:
        """Adds T tokens, which follow those before. Returns what their queries may see, as views where that is possible.

        positions_BT: (1, T), or (B, T) for a batch of sequences of different lengths.
        """
        new, end = key_BGTK.shape[2], self.length + key_BGTK.shape[2]
        if self._key is None or self._value is None:
            self._key, self._value = (
                x.new_zeros(*x.shape[:2], self.slots, x.shape[-1]) for x in (key_BGTK, value_BGTV)
            )
        if new == 1 or end <= self.slots:  # no token is overwritten that one of these queries sees
            self._write(key_BGTK, value_BGTV, positions_BT)
            return self._held(positions_BT[:, -1:])
        if self.length == 0:
            self._write(key_BGTK, value_BGTV, positions_BT)
            return KeyValue(key_BGTK, value_BGTV)
        before = self._held(positions_BT[:, :1] - 1)
        positions_BS = before.positions_BS
        if positions_BS is None:
            positions_BS = torch.arange(self.length, device=positions_BT.device)[None]
        together = KeyValue(
            torch.cat([before.key_BGSK, key_BGTK], dim=2),
            torch.cat([before.value_BGSV, value_BGTV], dim=2),
            torch.cat([positions_BS.expand(len(positions_BT), -1), positions_BT], dim=1),
        )
        self._write(key_BGTK, value_BGTV, positions_BT)
        return together

    def nbytes(self) -> int:
        """See `LayerCache`: of all slots."""
        return sum(tensor.nbytes for tensor in (self._key, self._value) if tensor is not None)

    @classmethod
    def batch(cls, caches: Sequence[LayerCache], capacity: int) -> KeyValueCache:
        """See `LayerCache`. Slots that a shorter sequence has not reached are zero."""
        rows = [cache for cache in caches if isinstance(cache, cls)]
        made = cls(capacity, window=rows[0].window, always_visible=rows[0].always_visible)
        made.length = max(row.length for row in rows)
        for name in ("_key", "_value"):
            parts = [getattr(row, name) for row in rows]
            whole = parts[0].new_zeros(len(rows), parts[0].shape[1], made.slots, parts[0].shape[3])
            for row, part in enumerate(parts):
                held = min(part.shape[2], made.slots)
                whole[row, :, :held] = part[0, :, :held]
            setattr(made, name, whole)
        return made

    def _write(self, key_BGTK: Tensor, value_BGTV: Tensor, positions_BT: Tensor) -> None:
        """Stores the tokens that are still seen after these."""
        start, new = self.length, key_BGTK.shape[2]
        self.length += new
        for held, tokens in ((self._key, key_BGTK), (self._value, value_BGTV)):
            assert held is not None, "append allocates"
            if len(positions_BT) > 1:
                rows = torch.arange(len(positions_BT), device=held.device)
                for t in range(new):
                    held[rows, :, self._slot(positions_BT[:, t])] = tokens[:, :, t]
            elif self.length <= self.slots:
                held[:, :, start : self.length] = tokens
            else:
                ring = self.slots - self.always_visible
                first = torch.arange(start, max(start, self.always_visible), device=held.device)
                last = torch.arange(max(start + len(first), self.length - ring), self.length, device=held.device)
                kept = torch.cat([first, last])
                held[:, :, self._slot(kept)] = tokens[:, :, kept - start]

    def _slot(self, positions: Tensor) -> Tensor:
        """Where the tokens at these positions are."""
        ring = max(1, self.slots - self.always_visible)
        in_ring = self.always_visible + (positions - self.always_visible) % ring
        return torch.where(positions < self.slots, positions, in_ring)

    def _held(self, last_B1: Tensor) -> KeyValue:
        """All tokens in the cache. last_B1: the position of the newest one of each row."""
        assert self._key is not None, "append allocates"
        assert self._value is not None, "append allocates"
        end = min(self.length, self.slots)
        positions_BS = None
        if len(last_B1) > 1 or self.length > self.slots:
            slot_S = torch.arange(end, device=last_B1.device)
            # of the positions that share a slot, the newest
            newest_BS = last_B1 - (last_B1 - slot_S) % max(1, self.slots - self.always_visible)
            in_order = (slot_S < self.always_visible) | (last_B1 < self.slots)
            positions_BS = torch.where(in_order, torch.where(slot_S <= last_B1, slot_S, -1), newest_BS)
        return KeyValue(self._key[:, :, :end], self._value[:, :, :end], positions_BS)


class Cache:
    """The caches of all layers of a decoder. layers: one entry for each layer; None if it needs none.

    capacity, length: in tokens of the text, of the longest sequence of a batch. prefix: tokens that come before the text (meta
    tokens) and are not counted. starts_B: how many tokens fewer each sequence of a batch has; None: all have the same length.
    """

    def __init__(self, capacity: int, layers: Sequence[LayerCache | None], *, prefix: int = 0) -> None:
        self.capacity, self.layers, self.prefix = capacity, layers, prefix
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
    """The caches of single sequences, all with a token, as that of a batch: no padding token is ever computed."""
    lengths, prefix = [cache.length for cache in caches], caches[0].prefix
    layers = [
        None if of_layer[0] is None else type(of_layer[0]).batch(of_layer, capacity + prefix)
        for of_layer in zip(*(cache.layers for cache in caches))
    ]
    made = Cache(capacity, layers, prefix=prefix)
    made.length = max(lengths)
    made.starts_B = torch.tensor([made.length - length for length in lengths], device=device)
    return made
