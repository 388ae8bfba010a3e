"""ModelConfig: what is refused, and the YAML files in configs/model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from megatron_lite.models import Decoder, ModelConfig
from megatron_lite.models.huggingface import family_named

CONFIGS = Path(__file__).parents[2] / "configs" / "model"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("family", "", "model.family"),
        ("hidden_size", 0, "model.hidden_size=0"),
        ("num_layers", None, "model.num_layers=None"),
        ("num_heads", -1, "model.num_heads=-1"),
        ("num_kv_heads", 3, "model.num_heads=4 does not divide by model.num_kv_heads=3"),
        ("head_dim", 0, "model.head_dim=0"),
        ("vocab_multiple", 0, "model.vocab_multiple=0"),
        ("rotary_fraction", 1.5, "model.rotary_fraction=1.5"),
        ("rotary_fraction", 0.45, "even number"),
        ("norm", "batchnorm", "model.norm='batchnorm' is not one of"),
        ("activation", "gelu", "model.activation='gelu' is not one of"),
        ("norm_eps", 0.0, "model.norm_eps=0.0"),
        ("init_std", float("nan"), "model.init_std=nan"),
        ("pattern", "*-", "exclude each other"),
    ],
)
def test_impossible_models_are_refused_by_name(nemotron, key, value, message):
    with pytest.raises(ValueError, match=message):
        nemotron(**{key: value}).validate()


def test_heads_that_do_not_divide_need_a_head_dim(nemotron):
    with pytest.raises(ValueError, match=r"model.hidden_size=50 does not divide by model.num_heads=4"):
        nemotron(hidden_size=50, head_dim=None).validate()
    nemotron(hidden_size=50, head_dim=12).validate()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_names_every_field_and_builds(path):
    values = yaml.safe_load(path.read_text())
    assert values.keys() == {field.name for field in fields(ModelConfig)}
    config = ModelConfig(**values)
    with torch.device("meta"):
        Decoder(config)
    assert family_named(config.family).to_hf_config(config)["vocab_size"] == config.vocab_size
