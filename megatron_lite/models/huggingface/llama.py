"""Llama (1 to 3.x) and Mistral <-> transformers' LlamaForCausalLM and MistralForCausalLM.

The same mathematics (RMSNorm, SwiGLU, full rotary, tied or untied head); Mistral's class may have a head dim
that is not hidden_size / num_heads where Llama's insists that hidden_size divides, has no biases, and may have a
sliding window in all layers. It counts the keys that a query sees, itself included; `attention.window` leaves itself out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from megatron_lite.models.config import ModelConfig
from megatron_lite.models.huggingface.family import PLAIN_ATTENTION, Family, read_sizes, written_sizes
from megatron_lite.models.huggingface.fields import integer, number
from megatron_lite.models.huggingface.rope import read_rope
from megatron_lite.models.huggingface.rules import transformer_rules

REQUIRED: dict[str, Any] = PLAIN_ATTENTION | {
    "norm": "rmsnorm",
    "mlp.activation": "swiglu",
    "rope.fraction": 1.0,
    "linear_bias": False,
}
MISTRAL_REQUIRED: dict[str, Any] = {key: value for key, value in REQUIRED.items() if key != "attention.window"} | {
    "attention.always_visible": 0,
    "attention.global_layers": [],
}
SHARED_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}


def exportable(config: ModelConfig) -> ModelConfig:
    """The same model in a family whose class can hold it: LlamaForCausalLM refuses a hidden size that is not a multiple of the number of
    heads, which pruned models have. MistralForCausalLM computes the same."""
    if config.family == "llama" and config.hidden_size % config.attention.heads:
        return replace(config, family="mistral")
    return config


def write_llama(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields for LlamaForCausalLM."""
    biases = {"attention_bias": False, "mlp_bias": False}
    return written_sizes(config) | _common(config) | biases


def write_mistral(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields for MistralForCausalLM."""
    window = config.attention.window
    return written_sizes(config) | _common(config) | {"sliding_window": None if window is None else window + 1}


def _common(config: ModelConfig) -> dict[str, Any]:
    return {"hidden_act": "silu", "rms_norm_eps": config.norm_eps, "attention_dropout": 0.0}


def read_mistral(hf: Mapping[str, Any]) -> ModelConfig:
    """The model of a MistralForCausalLM's config.json."""
    config = read_config(hf, family="mistral")
    if hf["sliding_window"] is not None:
        keys = integer(hf, "sliding_window")
        if keys < 2:
            raise ValueError(f"config.json: sliding_window={keys} must be at least 2 (a token and the one before it)")
        config.attention.window = keys - 1
    return config


def read_config(hf: Mapping[str, Any], *, family: str) -> ModelConfig:
    """The model of a config.json, without a window."""
    found = read_rope(hf, default_fraction=1.0)
    if found.fraction != 1.0:
        raise ValueError(
            f"config.json: partial_rotary_factor={found.fraction} cannot be held by family {family!r} (only 1.0)"
        )
    return ModelConfig(
        family=family,
        norm=REQUIRED["norm"],
        norm_eps=number(hf, "rms_norm_eps"),
        rope=found,
        **read_sizes(hf, activation=REQUIRED["mlp.activation"]),
    )


LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    required=REQUIRED,
    defaults=SHARED_DEFAULTS
    | {
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
    },
    only={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "attention_dropout": (0.0, None),
    },
    write_config=write_llama,
    read_config=partial(read_config, family="llama"),
    rules=transformer_rules,
)

MISTRAL = Family(
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    required=MISTRAL_REQUIRED,
    defaults=SHARED_DEFAULTS
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    },
    only={
        "hidden_act": ("silu",),
        "attention_dropout": (0.0, None),
        "layer_types": (None,),
    },
    write_config=write_mistral,
    read_config=read_mistral,
    rules=transformer_rules,
)
