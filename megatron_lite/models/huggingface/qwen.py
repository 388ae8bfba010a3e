"""Qwen2 (and 2.5) and Qwen3, dense <-> transformers' Qwen2ForCausalLM and Qwen3ForCausalLM.

Llama's mathematics, with biases in the query, key and value projections (Qwen2) or with a norm over each head of queries and keys
(Qwen3). Published folders name a sliding window and switch it off: the window is kept beside the model, switched on it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron_lite.models.config import ModelConfig
from megatron_lite.models.huggingface import llama
from megatron_lite.models.huggingface.family import Family, written_sizes
from megatron_lite.models.huggingface.rules import transformer_rules

QWEN2_REQUIRED = llama.REQUIRED | {"attention.qkv_bias": True}
QWEN3_REQUIRED = llama.REQUIRED | {"attention.qk_norm": True}


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields for Qwen2ForCausalLM, which has a head_dim only where it is not hidden_size / num_attention_heads."""
    written = _write(config)
    if config.head_dim * config.attention.heads == config.hidden_size:
        del written["head_dim"]
    return written


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields for Qwen3ForCausalLM."""
    return _write(config) | {"attention_bias": False}


def _write(config: ModelConfig) -> dict[str, Any]:
    sizes = written_sizes(config)
    full = {"use_sliding_window": False, "layer_types": ["full_attention"] * sizes["num_hidden_layers"]}
    return sizes | full | {"hidden_act": "silu", "rms_norm_eps": config.norm_eps, "attention_dropout": 0.0}


def read_config(hf: Mapping[str, Any], *, family: str, required: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json."""
    kinds = hf.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or set(kinds) - {"full_attention"}):
        raise ValueError(f"config.json: layer_types={kinds!r} is not supported (only full_attention)")
    config = llama.read_config(hf, family=family)
    config.attention.qkv_bias = required["attention.qkv_bias"]
    config.attention.qk_norm = required["attention.qk_norm"]
    return config


SHARED_DEFAULTS: dict[str, Any] = llama.SHARED_DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
}
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0, None),
    "use_sliding_window": (False,),
}

QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    required=QWEN2_REQUIRED,
    defaults={
        key: value for key, value in SHARED_DEFAULTS.items() if key != "head_dim"
    },  # it has no field of that name
    only=ONLY,
    write_config=write_qwen2,
    read_config=partial(read_config, family="qwen2", required=QWEN2_REQUIRED),
    rules=transformer_rules,
)

QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    required=QWEN3_REQUIRED,
    defaults=SHARED_DEFAULTS | {"head_dim": 128, "attention_bias": False},
    only=ONLY | {"attention_bias": (False,)},
    write_config=write_qwen3,
    read_config=partial(read_config, family="qwen3", required=QWEN3_REQUIRED),
    rules=transformer_rules,
)
