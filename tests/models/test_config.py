"""ModelConfig: what is refused, and the YAML files in configs/model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from megatron_lite.config.compose import from_dict, to_dict
from megatron_lite.models import Decoder, ModelConfig
from megatron_lite.models.huggingface import family_named, family_of
from megatron_lite.models.rope import SCALINGS

CONFIGS = Path(__file__).parents[2] / "configs" / "model"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("family", "", "model.family"),
        ("hidden_size", 0, "model.hidden_size=0"),
        ("num_layers", None, "model.num_layers=None"),
        ("attention.heads", -1, "model.attention.heads=-1"),
        ("attention.kv_heads", 3, "model.attention.heads=4 does not divide by model.attention.kv_heads=3"),
        ("attention.head_dim", 0, "model.attention.head_dim=0"),
        ("vocab_multiple", 0, "model.vocab_multiple=0"),
        ("rope.fraction", 1.5, "model.rope.fraction=1.5"),
        ("rope.fraction", 0.45, "even number"),
        ("norm", "batchnorm", "model.norm='batchnorm' is not one of"),
        ("mlp.activation", "gelu", "model.mlp.activation='gelu' is not one of"),
        ("norm_eps", 0.0, "model.norm_eps=0.0"),
        ("init_std", float("nan"), "model.init_std=nan"),
        ("pattern", "*-", "exclude each other"),
        ("rope.scaling", "dynamic", "model.rope.scaling='dynamic' is not one of null, linear, ntk, llama3, yarn"),
        ("rope.factor", 2.0, "model.rope.factor=2.0 has no effect with model.rope.scaling=null"),
        (
            "rope",
            {"scaling": "linear", "beta_fast": 9},
            "model.rope.beta_fast=9 has no effect .*=linear, which reads factor",
        ),
        ("rope", {"scaling": "linear", "factor": 0.5}, "model.rope.factor=0.5 must be at least 1"),
        ("rope", {"scaling": "linear", "fraction": 0.0}, "scales nothing with model.rope.fraction=0.0"),
        ("rope", {"scaling": "yarn", "factor": 2.0}, "scaling=yarn needs model.rope.original_seq_len"),
        (
            "rope",
            {"scaling": "ntk", "factor": 2.0, "original_seq_len": 65},
            "original_seq_len=65 to model.max_seq_len=64",
        ),
        (
            "rope",
            {"scaling": "llama3", "original_seq_len": 8, "low_freq_factor": 4.0},
            "model.rope.low_freq_factor=4.0 must be below model.rope.high_freq_factor=4.0",
        ),
    ],
)
def test_impossible_models_are_refused_by_name(nemotron, key, value, message):
    changes = {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
    with pytest.raises(ValueError, match=message):
        nemotron(**changes).validate()


def test_heads_that_do_not_divide_need_a_head_dim(nemotron):
    with pytest.raises(ValueError, match=r"model.hidden_size=50 does not divide by model.attention.heads=4"):
        nemotron(**{"hidden_size": 50, "attention.head_dim": None}).validate()
    nemotron(hidden_size=50).validate()


OPTIONAL = ("qkv_bias", "qk_norm", "value_head_dim", "window", "always_visible", "global_layers", "kv_groups")


def test_a_value_head_dim_that_says_what_is_so_anyway_is_taken(nemotron):
    nemotron(**{"attention.value_head_dim": 12}).validate()


def test_a_manifest_without_later_keys_loads_with_their_defaults(nemotron):
    """A key that a later version adds is missing in the manifests of today: here whole sections and single keys are."""
    config = nemotron()
    tree = to_dict(config)
    for key in ("mamba", "meta_tokens", "scaled_output_init"):
        del tree[key]
    for key in ("window", "kv_groups", "qk_norm"):
        del tree["attention"][key]
    assert from_dict(ModelConfig, tree) == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_says_what_its_family_reads_and_builds(path):
    values = yaml.safe_load(path.read_text())
    own = {"mamba"} if set(values["pattern"] or "") & set("MH") else set()
    own |= {"meta_tokens"} if values.get("meta_tokens") else set()
    assert values.keys() == {field.name for field in fields(ModelConfig)} - {"mamba", "meta_tokens"} | own
    config = from_dict(ModelConfig, values)
    switched_on = {"attention": {key for key in OPTIONAL if values["attention"].get(key)}}
    if config.rope.scaling is not None:
        switched_on["rope"] = {"scaling", *SCALINGS[config.rope.scaling].numbers}
    for section, keys in (
        ("attention", {"heads", "kv_heads", "head_dim"}),
        ("rope", {"base", "fraction"}),
        ("mlp", {"ffn_size", "activation"}),
    ):
        assert set(values[section]) == keys | switched_on.get(section, set())
    with torch.device("meta"):
        Decoder(config)
    assert family_named(config.family).to_hf_config(config)["vocab_size"] == config.vocab_size


PUBLISHED = {
    "llama3p2_3b": (
        3_212_749_824,
        {
            "model_type": "llama", "head_dim": 128, "hidden_size": 3072, "intermediate_size": 8192,
            "max_position_embeddings": 131072, "num_attention_heads": 24, "num_hidden_layers": 28, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
            "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                             "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        },
    ),
    "qwen2p5_0p5b": (
        494_032_768,
        {
            "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
            "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "sliding_window": 32768, "max_window_layers": 24, "use_sliding_window": False,
            "tie_word_embeddings": True, "vocab_size": 151936,
        },
    ),
    "qwen3_0p6b": (
        596_049_920,
        {
            "model_type": "qwen3", "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072,
            "max_position_embeddings": 40960, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
            "use_sliding_window": False, "tie_word_embeddings": True, "vocab_size": 151936,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_are_the_published_ones(name):
    """Sizes from the public config.json; the numbers of parameters are those that the model cards round."""
    parameters, published = PUBLISHED[name]
    config = from_dict(ModelConfig, yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
    assert family_of(published).from_hf_config(published) == config
    with torch.device("meta"):
        model = Decoder(config)
    padding = (config.padded_vocab - config.vocab_size) * config.hidden_size
    assert sum(parameter.numel() for parameter in model.parameters()) - padding == parameters
