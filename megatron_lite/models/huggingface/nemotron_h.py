"""Mamba-2/attention hybrids (Nemotron-H, Nemotron Nano 2) <-> transformers' NemotronHForCausalLM.

In transformers, too, every symbol of the pattern is one layer. config.json spells the pattern in one of three ways, with
letters or with two sets of words, and an export uses the spelling of the import. Models trained here are written with
letters, which all readers know.

`time_step_min` is the lower limit that transformers puts on dt (where it computes in chunks); it does not read `time_step_limit`.
No limit is written as the smallest normal fp32 number, which no dt is below, since transformers initializes dt from its logarithm.
`chunk_size` changes how the scan is computed and not what it gives, so it is kept beside the model, as is what only initializes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_lite.models.config import MambaConfig, MlpConfig, ModelConfig, RopeConfig
from megatron_lite.models.huggingface.family import PLAIN_ATTENTION, Family, attention, integer, number
from megatron_lite.models.huggingface.rules import Rule, fused_qkv, grouped, renamed, vocabulary

REQUIRED: dict[str, Any] = PLAIN_ATTENTION | {
    "norm": "rmsnorm",
    "rope.fraction": 0.0,
    "mlp.activation": "squared_relu",
    "linear_bias": False,
    "tie_embeddings": False,
}
NO_LIMIT = 2.0**-126
WORDS = {"full_attention": "*", "attention": "*", "mlp": "-", "linear_attention": "M", "mamba": "M"}


def write_config(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields."""
    unknown = sorted(set(config.symbols) - set(WORDS.values()))
    if unknown:
        raise ValueError(
            f"model.pattern={config.symbols!r} has {unknown[0]!r}, which NemotronHForCausalLM does not know"
        )
    least, most = config.mamba.dt_limits or (NO_LIMIT, math.inf)
    if most != math.inf:
        raise ValueError(
            f"model.mamba.dt_limits={config.mamba.dt_limits} cannot be written as NemotronHForCausalLM, which has no upper limit"
        )
    return {
        "hybrid_override_pattern": config.symbols,
        "num_hidden_layers": len(config.symbols),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp.ffn_size,
        "mlp_hidden_act": "relu2",
        "num_attention_heads": config.attention.heads,
        "num_key_value_heads": config.attention.kv_heads,
        "head_dim": config.head_dim if "*" in config.symbols else config.attention.head_dim or 0,
        "mamba_num_heads": config.mamba.heads,
        "mamba_head_dim": config.mamba.head_dim,
        "n_groups": config.mamba.groups,
        "ssm_state_size": config.mamba.state,
        "conv_kernel": config.mamba.conv,
        "time_step_min": least,
        "max_position_embeddings": config.max_seq_len,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": False,
        **{key: values[0] for key, values in ONLY.items()},
    }


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json."""
    least = number(hf, "time_step_min")
    return ModelConfig(
        family="nemotron_h",
        pattern=read_pattern(hf),
        vocab_size=integer(hf, "vocab_size"),
        hidden_size=integer(hf, "hidden_size"),
        max_seq_len=integer(hf, "max_position_embeddings"),
        attention=attention(hf),
        rope=RopeConfig(fraction=0.0),
        mlp=MlpConfig(ffn_size=integer(hf, "intermediate_size"), activation=REQUIRED["mlp.activation"]),
        mamba=MambaConfig(
            heads=integer(hf, "mamba_num_heads"),
            head_dim=integer(hf, "mamba_head_dim"),
            groups=integer(hf, "n_groups"),
            state=integer(hf, "ssm_state_size"),
            conv=integer(hf, "conv_kernel"),
            dt_limits=[least, math.inf] if least > NO_LIMIT else None,
        ),
        norm=REQUIRED["norm"],
        norm_eps=number(hf, "layer_norm_epsilon"),
        init_std=number(hf, "initializer_range"),
    )


def read_pattern(hf: Mapping[str, Any]) -> str:
    """The symbols. Words win over letters, as in transformers. Raises ValueError for a layer that does not exist here."""
    words = hf.get("layers_block_type")
    if words is None:
        letters = hf.get("hybrid_override_pattern")
        if not isinstance(letters, str):
            raise ValueError(
                f"config.json: layers_block_type={words!r} and hybrid_override_pattern={letters!r}: one of them must name the layers"
            )
        return letters
    if not isinstance(words, list) or not set(words) <= set(WORDS):
        raise ValueError(f"config.json: layers_block_type={words!r} must be a list of {', '.join(WORDS)}")
    return "".join(WORDS[word] for word in words)


def rules(config: ModelConfig) -> list[Rule]:
    """Rules for any pattern."""
    mamba = config.mamba
    heads = mamba.heads // mamba.groups
    inner = heads * mamba.head_dim
    found = [vocabulary("embedding.weight", "backbone.embeddings.weight", config=config)]
    for index, symbol in enumerate(config.symbols):
        ours, theirs = f"layers.{index}.mixer", f"backbone.layers.{index}.mixer"
        found.append(renamed(f"layers.{index}.norm.weight", f"backbone.layers.{index}.norm.weight"))
        if symbol == "*":
            names = [f"{theirs}.{part}_proj.weight" for part in "qkv"]
            found.append(fused_qkv(f"{ours}.qkv.weight", names, config=config))
            found.append(renamed(f"{ours}.out.weight", f"{theirs}.o_proj.weight"))
        elif symbol == "-":
            found += [renamed(f"{ours}.{part}.weight", f"{theirs}.{part}_proj.weight") for part in ("up", "down")]
        else:
            rows, channels = [inner, inner, mamba.state, mamba.state, heads], [inner, mamba.state, mamba.state]
            found.append(grouped(f"{ours}.in_proj.weight", f"{theirs}.in_proj.weight", groups=mamba.groups, sizes=rows))
            for part in ("weight", "bias"):
                found.append(
                    grouped(f"{ours}.conv.{part}", f"{theirs}.conv1d.{part}", groups=mamba.groups, sizes=channels)
                )
            found += [renamed(f"{ours}.ssm.{name}", f"{theirs}.{name}") for name in ("A_log", "dt_bias", "D")]
            found += [renamed(f"{ours}.{name}.weight", f"{theirs}.{name}.weight") for name in ("norm", "out_proj")]
    return [
        *found,
        renamed("final_norm.weight", "backbone.norm_f.weight"),
        vocabulary("head.weight", "lm_head.weight", config=config),
    ]


ONLY: dict[str, tuple[Any, ...]] = {
    "mamba_hidden_act": ("silu",),
    "use_conv_bias": (True,),
    "use_bias": (False,),
    "mamba_proj_bias": (False,),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "attention_dropout": (0.0, None),
    "hidden_dropout": (0.0, None),
    "sliding_window": (None,),
    "num_nextn_predict_layers": (0, None),
}
# The published folders name the code that came before transformers had this class.
PUBLISHED_CODE = {
    "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
    "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
}

NEMOTRON_H = Family(
    name="nemotron_h",
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    required=REQUIRED,
    defaults={
        "vocab_size": 131072,
        "hidden_size": 4096,
        "intermediate_size": 21504,
        "mlp_hidden_act": "relu2",
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "conv_kernel": 4,
        "time_step_min": 0.001,
        "max_position_embeddings": 4096,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "mamba_hidden_act": "silu",
        "use_conv_bias": True,
        "use_bias": False,
        "mamba_proj_bias": False,
        "mlp_bias": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "sliding_window": None,
        "num_nextn_predict_layers": 0,
    },
    only={**ONLY, "mlp_hidden_act": ("relu2",), "tie_word_embeddings": (False,), "auto_map": (None, PUBLISHED_CODE)},
    write_config=write_config,
    read_config=read_config,
    rules=rules,
    spellings=("layers_block_type", "hybrid_override_pattern", "num_hidden_layers", "time_step_min"),
)
