"""The rotary part of config.json: base, fraction and scaling.

transformers 5 keeps them in `rope_parameters`; older versions have flat `rope_theta` and `partial_rotary_factor`, and the scaling in
`rope_scaling`. All spellings are read, and an export writes both. `ntk` is not among transformers' scalings (its "dynamic" changes
with the length of each sequence): the families here cannot write it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_lite.models.config import ModelConfig, RopeConfig
from megatron_lite.models.huggingface.fields import integer, number

# scaling -> the name of each of its numbers in config.json
NUMBERS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_seq_len": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_seq_len": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}
_OPTIONAL = ("beta_fast", "beta_slow", "attention_factor")  # null, too, means the default, which is ours as well
_ONLY = {"truncate": True}  # keys of which only the default is supported


def read_rope(hf: Mapping[str, Any], *, default_fraction: float) -> RopeConfig:
    """Raises ValueError naming a kind of scaling, or a key of one, that is not supported."""
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    nested = hf.get(key) or {}
    if not isinstance(nested, Mapping) or any(isinstance(value, Mapping) for value in nested.values()):
        raise ValueError(f"config.json: {key}={nested!r} is not supported (only one set of numbers for all layers)")
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind != "default" and kind not in NUMBERS:
        raise ValueError(
            f"config.json: {key}={nested!r} is not supported (only rope_type default, {', '.join(NUMBERS)})"
        )
    flat = {"rope_theta": 10000.0, "partial_rotary_factor": default_fraction, **hf}
    merged = {**flat, **{name: nested[name] for name in ("rope_theta", "partial_rotary_factor") if name in nested}}
    rope = RopeConfig(base=number(merged, "rope_theta"), fraction=number(merged, "partial_rotary_factor"))
    if kind == "default":
        return rope
    rope.scaling = kind
    names = NUMBERS[kind]
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *names.values()}
    for name, value in nested.items():
        if name not in known and value is not None and value != _ONLY.get(name):
            raise ValueError(f"config.json: {key}: {name}={value!r} is not supported with rope_type {kind}")
    # As in transformers: a length beside the numbers counts more than one among them, and the model's own is the default.
    lengths = {name: hf[name] for name in ("original_max_position_embeddings",) if name in hf}
    values = {"original_max_position_embeddings": hf["max_position_embeddings"], **nested, **lengths}
    for ours, name in names.items():
        if ours not in _OPTIONAL or values.get(name) is not None:
            read = integer if ours == "original_seq_len" else number
            setattr(rope, ours, read(values, name))
    return rope


def written_rope(config: ModelConfig) -> dict[str, Any]:
    """The fields, in both spellings. Raises ValueError for a scaling that transformers does not know."""
    rope = config.rope
    if rope.scaling is None:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": rope.base}, "rope_theta": rope.base}
    if rope.scaling not in NUMBERS:
        raise ValueError(
            f"model.rope.scaling={rope.scaling!r} cannot be written with model.family={config.family}; transformers knows "
            f"{', '.join(NUMBERS)}"
        )
    scaling: dict[str, Any] = {"rope_type": rope.scaling}
    for ours, name in NUMBERS[rope.scaling].items():
        value = getattr(rope, ours)
        if ours not in _OPTIONAL or value != getattr(RopeConfig, ours):
            scaling[name] = value
    return {"rope_parameters": scaling | {"rope_theta": rope.base}, "rope_scaling": scaling, "rope_theta": rope.base}
