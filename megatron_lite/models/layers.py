"""The layer types: for each symbol of the pattern, how the mixer between norm and residual sum is made, and what it costs.

The one table in `models`: a new type is a row here and one in `parallel/plans.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from megatron_lite.models import attention, mamba, mlp
from megatron_lite.models.cache import KeyValueCache, LayerCache
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.pattern import NOT_BUILT


def _none(config: ModelConfig, seq_len: int) -> float:
    return 0.0


@dataclass(frozen=True)
class LayerType:
    """The layer type of one symbol.

    build: the mixer, whose forward(x_BTD, context) gives (B, T, D).
    check: raises ValueError naming a key of the config that such a layer cannot have.
    flops: training FLOPs of one token beyond 6 for each parameter, of (config, sequence length).
    cache: makes the layer's cache for generation, for a number of tokens; None if it needs none.
    """

    name: str
    build: Callable[[ModelConfig], nn.Module]
    check: Callable[[ModelConfig], None]
    flops: Callable[[ModelConfig, int], float] = _none
    cache: Callable[[int], LayerCache] | None = None


LAYER_TYPES: dict[str, LayerType] = {
    "*": LayerType("attention", attention.Attention, attention.check, attention.score_flops, KeyValueCache),
    "-": LayerType("feed-forward", mlp.build_mlp, mlp.check),
    "M": LayerType("Mamba-2", mamba.Mamba2, mamba.check, mamba.scan_flops, lambda capacity: mamba.StateCache()),
}


def check_layers(config: ModelConfig) -> None:
    """Raises ValueError for a symbol that is not in the table, and what the layer types of the pattern refuse."""
    symbols = config.symbols
    for symbol in dict.fromkeys(symbols):
        if symbol not in LAYER_TYPES:
            known = ", ".join(f"{symbol!r} {layer.name}" for symbol, layer in LAYER_TYPES.items())
            what = f", {NOT_BUILT[symbol]}, which is not built yet" if symbol in NOT_BUILT else ""
            raise ValueError(
                f"model.pattern={config.pattern!r} has {symbol!r} as layer {symbols.index(symbol)}{what}; the known layer "
                f"types are {known}"
            )
        LAYER_TYPES[symbol].check(config)
