"""Layer patterns: one symbol, one residual layer (Megatron's hybrid pattern).

`*` attention, `-` feed-forward. A transformer block is `*-`; hybrids spell the whole pattern.
"""

from __future__ import annotations

LAYER_TYPES = {"*": "attention", "-": "feed-forward"}
BLOCK = "*-"


def expand(*, num_layers: int | None, pattern: str | None) -> str:
    """The symbols of all residual layers: `pattern` as it is, or a transformer block `num_layers` times.

    Raises ValueError when both or neither of `num_layers` and `pattern` are given, or a symbol is unknown.
    """
    if pattern is not None:
        if num_layers is not None:
            raise ValueError(
                f"model.pattern={pattern!r} and model.num_layers={num_layers} exclude each other: the "
                "pattern spells every layer; set model.num_layers=null or model.pattern=null"
            )
        _check_symbols(pattern)
        return pattern
    if num_layers is None or num_layers < 1:
        raise ValueError(f"model.num_layers={num_layers} must be at least 1 when there is no model.pattern")
    return BLOCK * num_layers


def _check_symbols(pattern: str) -> None:
    known = ", ".join(f"{symbol!r} {name}" for symbol, name in LAYER_TYPES.items())
    if not pattern:
        raise ValueError(f"model.pattern is empty; write one symbol for each layer: {known}")
    for index, symbol in enumerate(pattern):
        if symbol not in LAYER_TYPES:
            raise ValueError(
                f"model.pattern={pattern!r} has {symbol!r} at place {index}; the known layer types are {known}"
            )
