"""What the layers of one forward share: position tables, attention mask, cache.

A plain dataclass on purpose, not a tuple: FSDP2 casts every tensor that it finds in a layer's tuple
arguments to the compute dtype, and cosines and sines in bf16 would lose a third of their digits.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_lite.models.cache import LayerCache


@dataclass(frozen=True)
class LayerContext:
    """Arguments beside x that a mixer may need; computed once a forward, never kept.

    cos, sin: rotary tables (B or 1, T, 1, 1, R/2) in float32, None without rotary positions.
    mask: (B or 1, 1, T, S) bool, True = attend; None means causal.
    cache: this layer's keys and values so far, in generation.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    mask: Tensor | None = None
    cache: LayerCache | None = None
