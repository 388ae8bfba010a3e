"""The sizes of a model that can be pruned: read from its config, and put into one, with the layers that stay.

The names of the axes are those of `axes.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

from megatron_lite.compress.axes import HIDDEN, layer_axes
from megatron_lite.models.config import AttentionConfig, ModelConfig
from megatron_lite.models.layers import LAYER_TYPES

CONFIG_KEYS = {
    HIDDEN: "hidden_size",
    "ffn_size": "mlp.ffn_size",
    "heads": "attention.heads",
    "mamba_heads": "mamba.heads",
    "mamba_head_dim": "mamba.head_dim",
}
UNITS: dict[str, str] = {
    "heads": "attention.kv_heads",
    "mamba_heads": "mamba.groups",
}  # axis -> what must divide its size


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """axis -> size, of the axes that the model has."""
    found = {axis for row in layer_axes(config) for axis in row.axes}
    return {axis: _value(config, key) for axis, key in CONFIG_KEYS.items() if axis == HIDDEN or axis in found}


def resized(config: ModelConfig, sizes: Mapping[str, int], layers: Sequence[int]) -> ModelConfig:
    """The config of a model that was cut to `sizes` and the residual `layers`. A head keeps its dimensions, a layer its window."""
    symbols = "".join(config.symbols[layer] for layer in layers)
    changed = reduce(lambda made, axis: _with(made, CONFIG_KEYS[axis], sizes[axis]), sizes, config)
    if "heads" in sizes:
        changed = _with(changed, "attention.head_dim", config.head_dim)
    changed = replace(changed, attention=_of_layers(changed.attention, config.symbols, layers))
    if config.pattern is None:
        return replace(changed, num_layers=len(symbols) // len(unit_layers(config)[0]))
    return replace(changed, pattern=symbols)


def _of_layers(attention: AttentionConfig, symbols: str, layers: Sequence[int]) -> AttentionConfig:
    """What is said of layers by their number, for those that stay; and nothing of what none of these has."""
    attending = [layer for layer, symbol in enumerate(symbols) if LAYER_TYPES[symbol].attends]
    kept = [number for number, layer in enumerate(attending) if layer in layers]
    without_window = [new for new, number in enumerate(kept) if number in attention.global_layers]
    if not kept:
        attention = replace(attention, qkv_bias=False, qk_norm=False)
    if len(without_window) == len(kept):
        return replace(attention, window=None, always_visible=0, global_layers=[])
    return replace(attention, global_layers=without_window)


def unit_layers(config: ModelConfig) -> list[tuple[int, ...]]:
    """What is removed together: the two residual layers of a transformer block, each layer of a pattern alone."""
    count = len(config.symbols)
    if config.pattern is not None or config.num_layers is None:
        return [(layer,) for layer in range(count)]
    size = count // config.num_layers
    return [tuple(range(start, start + size)) for start in range(0, count, size)]


def unit_of(config: ModelConfig, axis: str) -> int:
    """What the size of `axis` must be a multiple of."""
    return _value(config, UNITS[axis]) if axis in UNITS else 1


def _value(config: ModelConfig, key: str) -> int:
    return reduce(getattr, key.split("."), config)  # type: ignore[return-value]


def _with(config: ModelConfig, key: str, value: Any) -> ModelConfig:
    section, _, name = key.rpartition(".")
    if not section:
        return replace(config, **{name: value})
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})
