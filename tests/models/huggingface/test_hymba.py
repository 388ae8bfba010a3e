"""Hymba folders under the published names, both ways; values are those of the float64 reference."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_lite.config.compose import from_dict
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.huggingface import export_folder, family_named, open_folder
from megatron_lite.tensor_files import WholeTensors
from tests.models import hymba_reference as reference
from tests.models.test_config import CONFIGS
from tests.models.test_hymba_reference import TINY

# Beside the sizes, as the published folder has them.
PUBLISHED: dict[str, Any] = {
    "architectures": ["HymbaForCausalLM"], "model_type": "hymba", "attention_dropout": 0.0, "attn_hidden_size": -1,
    "attn_implementation": "flex", "attn_implementation_new": "flex", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "auto_map": {"AutoConfig": "configuration_hymba.HymbaConfig", "AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM"},
    "hidden_act": "silu", "mlp_hidden_act": "silu", "initializer_range": 0.02, "kq_head_dim": -1, "kq_norm": "none",
    "kv_reuse_every_i_layer": -1, "kv_weight_reuse": False, "mamba_conv_bias": True, "mamba_inner_layernorms": True,
    "mamba_proj_bias": False, "memory_tokens_interspersed_every": 0, "num_experts": 1, "num_experts_per_tok": 1, "num_mamba": 1,
    "rope": True, "seq_length": 8192, "torch_dtype": "bfloat16", "use_mamba_kernels": True,
}  # fmt: skip


def config_json(sizes: dict[str, Any]) -> dict[str, Any]:
    layers = sizes["num_hidden_layers"]
    inner = sizes["mamba_expand"] * sizes["hidden_size"]
    per_layer = {"layer_type": ["h"] * layers, "conv_dim": {str(index): inner for index in range(layers)}}
    return PUBLISHED | sizes | per_layer


@pytest.fixture
def folder(tmp_path):
    """A tiny folder as published: bf16 weights."""
    made = tmp_path / "published"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(config_json(TINY)))
    tensors = {name: tensor.bfloat16() for name, tensor in reference.random_tensors(TINY).items()}
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    return made


def test_a_published_folder_has_the_references_logits_and_goes_out_as_it_came(folder, tmp_path):
    opened = open_folder(folder)
    model = Decoder(opened.config)
    model.load_state_dict(dict(WholeTensors(opened.tensors).items()), assign=True)
    tokens = torch.randint(0, TINY["vocab_size"], (1, 25), generator=torch.Generator().manual_seed(0))
    expected = reference.run(load_file(folder / "model.safetensors"), TINY, tokens[0].tolist()).logits_TV
    with torch.no_grad():
        torch.testing.assert_close(model.double()(tokens)[0], expected, rtol=0, atol=1e-10)
    tensors = WholeTensors(opened.tensors)
    for name in ("a", "b"):
        export_folder(tmp_path / name, config=opened.config, tensors=tensors, extra=opened.extra)
        opened = open_folder(tmp_path / name)
        tensors = WholeTensors(opened.tensors)
    written, came = (load_file(path / "model.safetensors") for path in (tmp_path / "a", folder))
    assert written.keys() == came.keys()
    assert all(torch.equal(tensor, came[name]) for name, tensor in written.items())
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == config_json(TINY)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_the_published_config_is_ours():
    ours = from_dict(ModelConfig, yaml.safe_load((CONFIGS / "hymba_1p5b.yaml").read_text()))
    published = config_json(reference.PUBLISHED_1P5B)
    family = family_named("hymba")
    assert family.from_hf_config(published) == ours
    del published["torch_dtype"]  # that of the weights is written
    assert family.with_extra(ours, family.extra(published, ours)) == published


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 2}, "num_experts=2"),
        ({"layer_type": ["h", "m", "h", "h"]}, "layer_type"),
        ({"kq_head_dim": 12}, "kq_head_dim=12"),
        ({"kq_norm": "rms"}, "kq_norm='rms'"),
        ({"rope_type": "yarn"}, "rope_type='yarn'"),
        ({"kv_weight_reuse": True}, "kv_weight_reuse=True"),
        ({"memory_tokens_interspersed_every": 64}, "memory_tokens_interspersed_every=64"),
        ({"kv_reuse_group": [[0, 9]]}, r"kv_groups=\[\[0, 9\]\]"),
        ({"v_head_dim": None}, "v_head_dim=None"),
    ],
)
def test_fields_that_cannot_be_held(changes, message):
    with pytest.raises(ValueError, match=message):
        family_named("hymba").from_hf_config(config_json(TINY) | changes)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pattern", "H-H-*-", "pattern"),
        ("meta_tokens", 2, "always_visible=3, which is not model.meta_tokens=2"),
        ("norm", "layernorm", "norm='layernorm'"),
    ],
)
def test_what_cannot_be_written(key, value, message):
    config = replace(family_named("hymba").from_hf_config(config_json(TINY)), **{key: value})
    config.attention.kv_groups = []
    with pytest.raises(ValueError, match=message):
        family_named("hymba").to_hf_config(config)


def test_no_other_family_writes_a_window(llama):
    with pytest.raises(ValueError, match=r"model\.attention\.window=8 cannot be written as LlamaForCausalLM"):
        family_named("llama").to_hf_config(llama(**{"attention.window": 8}))
