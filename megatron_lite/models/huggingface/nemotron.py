"""Nemotron-4 (arXiv 2402.16819) <-> transformers' NemotronForCausalLM.

LayerNorm1p's gain is stored as its distance from one on both sides, so it is copied as it is.
`num_key_value_heads` is always written: without it transformers cannot build the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_lite.models.config import ModelConfig
from megatron_lite.models.huggingface.family import PLAIN_ATTENTION, Family, number, read_sizes, written_sizes
from megatron_lite.models.huggingface.rope import read_rope
from megatron_lite.models.huggingface.rules import transformer_rules

REQUIRED: dict[str, Any] = PLAIN_ATTENTION | {
    "norm": "layernorm1p",
    "mlp.activation": "squared_relu",
    "linear_bias": False,
}


def write_config(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields."""
    if config.rotary_dim == 0:
        raise ValueError(
            f"model.rope.fraction={config.rope.fraction} rotates nothing, and NemotronForCausalLM "
            "always rotates some dimensions; use at least 2 of a head's"
        )
    sizes = written_sizes(config)
    sizes["rope_parameters"]["partial_rotary_factor"] = config.rope.fraction
    return sizes | {
        "partial_rotary_factor": config.rope.fraction,
        "hidden_act": "relu2",
        "norm_eps": config.norm_eps,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json."""
    return ModelConfig(
        family="nemotron4",
        norm_eps=number(hf, "norm_eps"),
        norm=REQUIRED["norm"],
        rope=read_rope(hf, default_fraction=0.5),
        **read_sizes(hf, activation=REQUIRED["mlp.activation"]),
    )


NEMOTRON4 = Family(
    name="nemotron4",
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    required=REQUIRED,
    defaults={
        "vocab_size": 256000,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 32,
        "num_attention_heads": 48,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "initializer_range": 0.0134,
        "norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    },
    only={
        "hidden_act": ("relu2",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "attention_dropout": (0.0, None),
    },
    write_config=write_config,
    read_config=read_config,
    rules=transformer_rules,
)
