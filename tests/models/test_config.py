"""ModelConfig: what is refused, and the YAML files in configs/model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from megatron_lite.config.compose import from_dict, to_dict
from megatron_lite.models import Decoder, ModelConfig
from megatron_lite.models.huggingface import family_named

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
    ],
)
def test_impossible_models_are_refused_by_name(nemotron, key, value, message):
    with pytest.raises(ValueError, match=message):
        nemotron(**{key: value}).validate()


def test_heads_that_do_not_divide_need_a_head_dim(nemotron):
    with pytest.raises(ValueError, match=r"model.hidden_size=50 does not divide by model.attention.heads=4"):
        nemotron(**{"hidden_size": 50, "attention.head_dim": None}).validate()
    nemotron(hidden_size=50).validate()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.qkv_bias", True),
        ("attention.qk_norm", True),
        ("rope.scaling", "ntk"),
    ],
)
def test_what_is_not_built_yet_is_refused_by_name(nemotron, key, value):
    with pytest.raises(ValueError, match=rf"model\.{key}=.* is not built yet"):
        nemotron(**{key: value}).validate()


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
    own = {"mamba"} if "M" in (values["pattern"] or "") else set()
    assert values.keys() == {field.name for field in fields(ModelConfig)} - {"mamba", "meta_tokens"} | own
    assert {key: set(values[key]) for key in ("attention", "rope", "mlp")} == {
        "attention": {"heads", "kv_heads", "head_dim"},
        "rope": {"base", "fraction"},
        "mlp": {"ffn_size", "activation"},
    }
    config = from_dict(ModelConfig, values)
    with torch.device("meta"):
        Decoder(config)
    assert family_named(config.family).to_hf_config(config)["vocab_size"] == config.vocab_size
