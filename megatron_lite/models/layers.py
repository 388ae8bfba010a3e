"""The layer types: for each symbol of the pattern, how the mixer between norm and residual sum is made, and what it costs.

The one table in `models`: a new type is a row here and one in `parallel/plans.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from torch import nn

from megatron_lite.models import attention, hymba, mamba, mlp
from megatron_lite.models.cache import LayerCache
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.pattern import NOT_BUILT, LayerSpec


def _no_flops(config: ModelConfig, spec: LayerSpec, seq_len: int) -> float:
    return 0.0


def _no_cache(config: ModelConfig, spec: LayerSpec, capacity: int) -> None:
    return None


@dataclass(frozen=True)
class LayerType:
    """The layer type of one symbol.

    build: the mixer, whose forward(x_BTD, context) gives ((B, T, D), keys and values for other layers or None).
    check: raises ValueError naming a key of the config that such a layer cannot have.
    flops: training FLOPs of one token beyond 6 for each parameter, of (config, spec, sequence length).
    cache: makes the layer's cache for generation, for a number of tokens; None if it needs none.
    attends: has keys and values, a window, and a place in `attention.global_layers` and `attention.kv_groups`.
    """

    name: str
    build: Callable[[ModelConfig, LayerSpec], nn.Module]
    check: Callable[[ModelConfig], None]
    flops: Callable[[ModelConfig, LayerSpec, int], float] = _no_flops
    cache: Callable[[ModelConfig, LayerSpec, int], LayerCache | None] = _no_cache
    attends: bool = False


LAYER_TYPES: dict[str, LayerType] = {
    "*": LayerType(
        "attention",
        attention.Attention,
        attention.check,
        attention.score_flops,
        attention.keys_cache,
        attends=True,
    ),
    "-": LayerType("feed-forward", mlp.build_mlp, mlp.check),
    "M": LayerType("Mamba-2", mamba.Mamba2, mamba.check, mamba.scan_flops, lambda *_: mamba.StateCache()),
    "H": LayerType("Hymba", hymba.Hymba, hymba.check, hymba.flops, hymba.cache, attends=True),
}


def layer_specs(config: ModelConfig) -> list[LayerSpec]:
    """What each residual layer is, of a config that was validated."""
    attending = [index for index, symbol in enumerate(config.symbols) if LAYER_TYPES[symbol].attends]
    number_of = {index: number for number, index in enumerate(attending)}
    windows = [None if n in config.attention.global_layers else config.attention.window for n in range(len(attending))]
    groups = {member: group for group in config.attention.kv_groups for member in group}
    specs = []
    for index, symbol in enumerate(config.symbols):
        if index not in number_of:
            specs.append(LayerSpec(symbol))
            continue
        number = number_of[index]
        group = groups.get(number, [number])
        seen = [windows[member] for member in group]
        specs.append(
            LayerSpec(
                symbol,
                window=windows[number],
                kv_from=None if number == group[0] else attending[group[0]],
                kv_window=None if None in seen else max(window for window in seen if window is not None),
                shares=number == group[0] and len(group) > 1,
            )
        )
    return specs


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
    attending = sum(LAYER_TYPES[symbol].attends for symbol in symbols)
    if not attending:
        _check_nothing_attends(config)
    _check_numbers(config, attending=attending)


def _check_nothing_attends(config: ModelConfig) -> None:
    """Raises ValueError for a choice about attention, which a pattern without attention would ignore. Its sizes may stay."""
    for key in ("window", "always_visible", "global_layers", "kv_groups", "qkv_bias", "qk_norm"):
        value = getattr(config.attention, key)
        if value:
            raise ValueError(
                f"model.attention.{key}={value} has no effect: no layer of model.pattern={config.pattern!r} attends; drop "
                f"model.attention.{key}, or give the pattern a layer '*' or 'H'"
            )


def _check_numbers(config: ModelConfig, *, attending: int) -> None:
    """Raises ValueError where `global_layers` or `kv_groups` name layers that the pattern does not have, name one twice, or leave no
    layer to the window."""
    groups = config.attention.kv_groups
    for group in groups:
        if len(group) < 2 or sorted(set(group)) != group:
            raise ValueError(
                f"model.attention.kv_groups={groups} has the group {group}, which must name two layers or more, in rising order"
            )
    for key, numbers in (("global_layers", config.attention.global_layers), ("kv_groups", list(chain(*groups)))):
        value = getattr(config.attention, key)
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"model.attention.{key}={value} names a layer twice")
        if not set(numbers) <= set(range(attending)):
            raise ValueError(
                f"model.attention.{key}={value} must name layers that attend, of which the pattern has {attending}, counted from 0"
            )
    window, without = config.attention.window, config.attention.global_layers
    if window is not None and len(without) == attending:
        raise ValueError(
            f"model.attention.window={window} has no effect: model.attention.global_layers={without} name all {attending} layers that "
            "attend; take one out, or set the window to null and drop global_layers and always_visible"
        )
