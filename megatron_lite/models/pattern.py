"""Layer patterns: one symbol, one residual layer (the symbols of Megatron-LM's hybrid pattern).

`*` attention, `-` feed-forward, `M` Mamba-2, `H` Hymba's parallel heads; `LAYER_TYPES` in `layers.py` has them all. A transformer
block is `*-`; hybrids spell the whole pattern. `|` marks where pipeline stages are cut; it is not a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = "*-"
CUT = "|"
# Megatron-LM's symbols for what does not exist here.
NOT_BUILT = {
    "G": "gated delta net",
    "D": "sparse attention",
    "+": "multi-head latent attention",
    "E": "mixture of experts",
    "/": "multi-token prediction",
}


@dataclass(frozen=True)
class LayerSpec:
    """What one residual layer is.

    window: how many tokens its queries look back, themselves not counted; None: all, as in layers that do not attend.
    kv_from: the layer whose keys and values it uses; None: its own, if it has any.
    kv_window: the widest window of the layers that use its keys and values, its own included; None: one of them sees all.
    shares: other layers use its keys and values.
    """

    symbol: str
    window: int | None = None
    kv_from: int | None = None
    kv_window: int | None = None
    shares: bool = False


def expand(*, num_layers: int | None, pattern: str | None) -> str:
    """The symbols of all residual layers: `pattern` without its cuts, or a transformer block `num_layers` times.

    Raises ValueError when both or neither of `num_layers` and `pattern` are given, or the pattern has no layer.
    """
    if pattern is not None:
        if num_layers is not None:
            raise ValueError(
                f"model.pattern={pattern!r} and model.num_layers={num_layers} exclude each other: the "
                "pattern spells every layer; set model.num_layers=null or model.pattern=null"
            )
        symbols = pattern.replace(CUT, "")
        if not symbols:
            raise ValueError(
                f"model.pattern={pattern!r} has no layers; write one symbol for each layer, such as {BLOCK!r}"
            )
        return symbols
    if num_layers is None or num_layers < 1:
        raise ValueError(f"model.num_layers={num_layers} must be at least 1 when there is no model.pattern")
    return BLOCK * num_layers
