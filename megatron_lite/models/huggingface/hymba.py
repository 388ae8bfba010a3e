"""Hymba <-> the config.json and tensor names of nvidia/Hymba-1.5B-Base, whose code comes with the folder (no class in transformers).

One of its layers is two of ours, `H-`. The rows of its `in_proj` are all queries, then all keys, values, channels and gates; ours are
group by group. `pre_avg_layernorm1` is the norm of the attention branch, `pre_avg_layernorm2` that of the other. The meta tokens are
what its window always shows. Fields that choose between ways of computing the same (`attn_implementation` and others) are kept beside
the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_lite.models.config import AttentionConfig, MambaConfig, MlpConfig, ModelConfig, RopeConfig
from megatron_lite.models.huggingface.family import Family
from megatron_lite.models.huggingface.fields import integer, number, switch
from megatron_lite.models.huggingface.rules import Rule, grouped, renamed, vocabulary
from megatron_lite.models.layers import layer_specs

BLOCK = "H-"
NTK_FACTOR = 2.0  # a constant of the published code
REQUIRED: dict[str, Any] = {
    "norm": "rmsnorm",
    "rope.fraction": 1.0,
    "mlp.activation": "swiglu",
    "linear_bias": False,
    "attention.qkv_bias": False,
    "attention.qk_norm": False,
}


def write_config(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields."""
    layers, inner = len(config.symbols) // len(BLOCK), config.mamba.heads * config.mamba.head_dim
    refusals = {
        f"model.pattern={config.symbols!r}, which is not {BLOCK!r} repeated": config.symbols != BLOCK * layers,
        f"model.attention.head_dim={config.head_dim}, which is not hidden_size/heads": config.head_dim
        * config.attention.heads
        != config.hidden_size,
        f"{inner} channels (model.mamba.heads x head_dim), which are not a multiple of model.hidden_size": inner
        % config.hidden_size
        != 0,
        f"model.attention.always_visible={config.attention.always_visible}, which is not model.meta_tokens="
        f"{config.meta_tokens}": config.attention.window is not None
        and config.attention.always_visible != config.meta_tokens,
        f"model.rope.scaling={config.rope.scaling!r} with factor {config.rope.factor}": config.rope.scaling is not None
        and (config.rope.scaling, config.rope.factor) != ("ntk", NTK_FACTOR),
    }
    for what, is_so in refusals.items():
        if is_so:
            raise ValueError(f"{what}, cannot be written as HymbaForCausalLM")
    return {
        "num_hidden_layers": layers,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp.ffn_size,
        "num_attention_heads": config.attention.heads,
        "num_key_value_heads": config.attention.kv_heads,
        "kq_head_dim": -1,
        "v_head_dim": config.value_head_dim,
        "sliding_window": config.attention.window,
        "global_attn_idx": config.attention.global_layers,
        "kv_reuse_group": config.attention.kv_groups or None,
        "num_memory_tokens": config.meta_tokens,
        "mamba_expand": inner // config.hidden_size,
        "mamba_d_state": config.mamba.state,
        "mamba_d_conv": config.mamba.conv,
        "mamba_dt_rank": config.mamba.dt_rank,
        "conv_dim": {str(index): inner for index in range(layers)},
        "layer_type": ["h"] * layers,
        "rope_theta": config.rope.base,
        "rope_type": config.rope.scaling,
        "orig_max_position_embeddings": config.rope.original_seq_len,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        **{key: values[0] for key, values in ONLY.items()},
    }


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json."""
    layers, hidden, heads = (integer(hf, key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    inner, value_dim, meta = (
        integer(hf, "mamba_expand") * hidden,
        integer(hf, "v_head_dim"),
        integer(hf, "num_memory_tokens"),
    )
    head_dim = hidden // max(1, heads)
    kinds, widths = hf.get("layer_type") or ["h"] * layers, hf.get("conv_dim") or {}
    for key, is_so in (
        ("kq_head_dim", hf.get("kq_head_dim", -1) in (-1, None, head_dim)),
        ("layer_type", kinds == ["h"] * layers),
        ("conv_dim", set(widths.values()) <= {inner}),
    ):
        if not is_so:
            raise ValueError(f"config.json: {key}={hf[key]!r} is not supported")
    rank, window, without = hf.get("mamba_dt_rank"), hf.get("sliding_window"), []
    if window is not None:
        window, without = integer(hf, "sliding_window"), _numbers(hf, "global_attn_idx")
        if set(without) == set(range(layers)):  # a window that no layer has
            window, without = None, []
    return ModelConfig(
        family="hymba",
        pattern=BLOCK * layers,
        vocab_size=integer(hf, "vocab_size"),
        hidden_size=hidden,
        max_seq_len=integer(hf, "max_position_embeddings"),
        meta_tokens=meta,
        attention=AttentionConfig(
            heads=heads,
            kv_heads=integer(hf, "num_key_value_heads"),
            head_dim=head_dim,
            value_head_dim=value_dim,
            window=window,
            always_visible=0 if window is None else meta,
            global_layers=without,
            kv_groups=_groups(hf, "kv_reuse_group"),
        ),
        rope=_rope(hf),
        mlp=MlpConfig(ffn_size=integer(hf, "intermediate_size"), activation=REQUIRED["mlp.activation"]),
        mamba=MambaConfig(
            version=1,
            heads=inner // max(1, value_dim),
            head_dim=value_dim,
            state=integer(hf, "mamba_d_state"),
            conv=integer(hf, "mamba_d_conv"),
            dt_rank=math.ceil(hidden / 16) if rank == "auto" else integer(hf, "mamba_dt_rank"),
        ),
        norm=REQUIRED["norm"],
        norm_eps=number(hf, "rms_norm_eps"),
        init_std=number(hf, "initializer_range"),
        tie_embeddings=switch(hf, "tie_word_embeddings"),
    )


def _rope(hf: Mapping[str, Any]) -> RopeConfig:
    rope = RopeConfig(base=number(hf, "rope_theta"))
    if hf.get("rope_type") == "ntk":
        rope.scaling, rope.factor = "ntk", NTK_FACTOR
        rope.original_seq_len = integer(hf, "orig_max_position_embeddings")
    return rope


def _numbers(hf: Mapping[str, Any], key: str) -> list[int]:
    value = hf.get(key) or []
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise ValueError(f"config.json: {key}={value!r} must be a list of whole numbers")
    return value


def _groups(hf: Mapping[str, Any], key: str) -> list[list[int]]:
    value = hf.get(key) or []
    if not isinstance(value, list):
        raise ValueError(f"config.json: {key}={value!r} must be a list of lists of whole numbers")
    return [_numbers({key: group}, key) for group in value]


def rules(config: ModelConfig) -> list[Rule]:
    """Rules for layers `H-`."""
    groups = config.attention.kv_heads
    found = [vocabulary("embedding.weight", "model.embed_tokens.weight", config=config)]
    if config.meta_tokens:
        found.append(renamed("embedding.meta_tokens", "model.memory_tokens"))
    specs = layer_specs(config)
    for block in range(len(specs) // 2):
        mixer, mlp, hf = f"layers.{2 * block}", f"layers.{2 * block + 1}", f"model.layers.{block}"
        found.append(renamed(f"{mixer}.norm.weight", f"{hf}.input_layernorm.weight"))
        found.append(renamed(f"{mlp}.norm.weight", f"{hf}.pre_moe_layernorm.weight"))
        rows = (
            f"{mixer}.mixer.in_proj.weight",
            f"{hf}.mamba.in_proj.weight",
        )
        found.append(grouped(*rows, groups=groups, sizes=_rows(config, own_keys=specs[2 * block].kv_from is None)))
        found += [renamed(f"{mixer}.mixer.{ours}", f"{hf}.mamba.{theirs}") for ours, theirs in MIXER.items()]
        for name in ("gate", "up", "down"):
            found.append(renamed(f"{mlp}.mixer.{name}.weight", f"{hf}.moe.experts.0.{name}_proj.weight"))
    found.append(renamed("final_norm.weight", "model.final_layernorm.weight"))
    return found if config.tie_embeddings else [*found, vocabulary("head.weight", "lm_head.weight", config=config)]


def _rows(config: ModelConfig, *, own_keys: bool) -> list[int]:
    """Of one group: queries, key, value, channels, gates."""
    groups = config.attention.kv_heads
    channels = config.mamba.heads * config.mamba.head_dim // groups
    queries = config.attention.heads // groups * config.head_dim
    return [queries, *([config.head_dim, config.value_head_dim] if own_keys else []), channels, channels]


MIXER = {
    "conv.weight": "conv1d.weight",
    "conv.bias": "conv1d.bias",
    "select.x_proj.weight": "x_proj.0.weight",
    "select.dt_norm.weight": "dt_layernorm.weight",
    "select.B_norm.weight": "B_layernorm.weight",
    "select.C_norm.weight": "C_layernorm.weight",
    "dt_proj.weight": "dt_proj.0.weight",
    "ssm.dt_bias": "dt_proj.0.bias",
    "ssm.A_log": "A_log.0",
    "ssm.D": "D.0",
    "attention_norm.weight": "pre_avg_layernorm1.weight",
    "ssm_norm.weight": "pre_avg_layernorm2.weight",
    "out_proj.weight": "out_proj.weight",
}
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_hidden_act": ("silu",),
    "attn_hidden_size": (-1, None),
    "kq_norm": ("none", None),
    "rope": (True,),
    "mamba_conv_bias": (True,),
    "mamba_proj_bias": (False,),
    "mamba_inner_layernorms": (True,),
    "num_mamba": (1,),
    "num_experts": (1,),
    "num_experts_per_tok": (1,),
    "memory_tokens_interspersed_every": (0,),
    "kv_weight_reuse": (False,),
    "kv_reuse_every_i_layer": (-1,),
    "attention_dropout": (0.0, None),
}
PUBLISHED_CODE = {
    "AutoConfig": "configuration_hymba.HymbaConfig",
    "AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM",
}

HYMBA = Family(
    name="hymba",
    model_type="hymba",
    architecture="HymbaForCausalLM",
    required=REQUIRED,
    # What a folder leaves out and cannot be guessed (sizes above all) is refused; these say "as published".
    defaults={key: values[0] for key, values in ONLY.items()} | {"rope_theta": 10000.0, "initializer_range": 0.02},
    only={**ONLY, "rope_type": ("ntk", None), "auto_map": (None, PUBLISHED_CODE)},
    write_config=write_config,
    read_config=read_config,
    rules=rules,
    spellings=(
        "kq_head_dim",
        "global_attn_idx",
        "kv_reuse_group",
        "mamba_dt_rank",
        "layer_type",
        "conv_dim",
        "orig_max_position_embeddings",
    ),
)
