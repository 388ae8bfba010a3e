"""Folders: byte-stable round trips, shards, streaming, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_lite.models import ModelConfig
from megatron_lite.models.huggingface import export_folder, family_named, is_folder, open_folder
from megatron_lite.tensor_files import WholeTensors
from megatron_lite.weights import open_weights


def native(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def bytes_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def exported(nemotron, loud, tmp_path):
    model = loud(nemotron())
    export_folder(tmp_path / "hf", config=model.config, tensors=native(model))
    return tmp_path / "hf"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("changes", [{}, {"attention.kv_heads": 1, "tie_embeddings": True}])
def test_native_hf_native_hf_is_byte_stable(nemotron, loud, tmp_path, dtype, max_shard_bytes, changes):
    config = nemotron(**changes)
    tensors = native(loud(config).to(dtype))
    export_folder(tmp_path / "a", config=config, tensors=tensors, max_shard_bytes=max_shard_bytes)
    opened = open_folder(tmp_path / "a")
    assert opened.tensors.names() == tensors.keys()
    for name, tensor in WholeTensors(opened.tensors).items():
        width = tensor.shape[0] if name in ("embedding.weight", "head.weight") else None
        assert tensor.dtype == dtype
        # vocab_multiple is ours and not the file's: padded to the default 128 there
        expected = torch.zeros_like(tensor) if width else tensors[name]
        if width:
            expected[: config.vocab_size] = tensors[name][: config.vocab_size]
        assert torch.equal(tensor, expected), name
    export_folder(
        tmp_path / "b",
        config=opened.config,
        tensors=WholeTensors(opened.tensors),
        extra=opened.extra,
        max_shard_bytes=max_shard_bytes,
    )
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_config_survives(nemotron, llama, loud, tmp_path):
    configs = [
        nemotron(vocab_multiple=128, init_std=0.0134),
        llama(**{"vocab_multiple": 128, "norm_eps": 1e-6, "rope.base": 1e6}),
        llama(vocab_multiple=128, family="mistral", tie_embeddings=True),
        llama(**{"family": "mistral", "attention.window": 7, "vocab_multiple": 128}),
    ]
    for index, config in enumerate(configs):
        export_folder(tmp_path / str(index), config=config, tensors=native(loud(config)))
        assert open_folder(tmp_path / str(index)).config == config


def test_shards_hold_at_most_what_was_asked_and_the_index_finds_everything(nemotron, loud, tmp_path):
    model = loud(nemotron())
    export_folder(tmp_path / "hf", config=model.config, tensors=native(model), max_shard_bytes=20_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("model-*-of-*.safetensors"))
    assert {path.name for path in files} == set(index["weight_map"].values())
    total = 0
    for path in files:
        tensors = load_file(path)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 20_000 or len(tensors) == 1
        assert all(index["weight_map"][name] == path.name for name in tensors)
        total += size
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}  # transformers refuses files without it
    assert total == index["metadata"]["total_size"]


def test_token_ids_and_other_fields_are_kept(exported, tmp_path):
    edit_config(exported, eos_token_id=[3, 5], bos_token_id=2, my_note={"a": 1}, use_cache=False)
    (exported / "generation_config.json").write_text('{"eos_token_id": [3, 5], "top_p": 0.9}')
    opened = open_folder(exported)
    export_folder(tmp_path / "b", config=opened.config, tensors=WholeTensors(opened.tensors), extra=opened.extra)
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (exported, tmp_path / "b"))
    assert first == second
    written = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert written == {"eos_token_id": [3, 5], "top_p": 0.9}


STREAM = """
import resource, sys, torch
from dataclasses import replace
from megatron_lite.models.huggingface import export_folder, open_folder
from megatron_lite.models.huggingface.export import expected_shapes
from tests.model_configs import model_config
torch.set_num_threads(1)
config = model_config({"family": "nemotron4", "num_layers": 16, "hidden_size": 512, "attention.heads": 8, "attention.kv_heads": 2,
                       "mlp.ffn_size": 3072, "vocab_size": 1000, "max_seq_len": 64, "rope.fraction": 0.5})
class Lazy(dict):
    def __getitem__(self, name):
        return torch.full(super().__getitem__(name), 0.5)
lazy = Lazy(expected_shapes(config))
megabytes = sum(shape.numel() for shape in lazy.values()) * 4 >> 20
assert megabytes > 230, megabytes
small = replace(config, num_layers=1)
export_folder(sys.argv[1] + "/warm", config=small, tensors=Lazy(expected_shapes(small)), max_shard_bytes=1 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export_folder(sys.argv[1] + "/a", config=config, tensors=lazy, max_shard_bytes=64 << 20)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_export_streams(tmp_path):
    command = [sys.executable, "-c", STREAM, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    # three times the largest tensor (6 MiB), and what the allocator keeps; a file has 64 MiB, the model 230
    assert int(result.stdout) < 30, result.stdout


BAD_FIELDS = [
    ({"model_type": "gpt2"}, "model_type='gpt2'"),
    ({"architectures": ["NemotronForSequenceClassification"]}, "NemotronForSequenceClassification"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"mlp_bias": True}, "mlp_bias=True"),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling={'type': 'dynamic'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": "4"}}, "factor='4' must be a number"),
    ({"rope_scaling": {"type": "default", "mrope_section": [1, 2]}}, r"rope_scaling: mrope_section=\[1, 2\]"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}}, "rope_parameters: mscale=0.7"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "rope_parameters: truncate=False"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config={'quant_method': 'fp8'}"),
    ({"auto_map": {"AutoConfig": "x.py"}}, "auto_map="),
    ({"hidden_size": "48"}, "hidden_size='48' must be a whole number"),
    ({"norm_eps": None}, "norm_eps=None must be a number"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no' must be true or false"),
    ({"num_key_value_heads": 3}, "attention.kv_heads=3"),
    ({"num_hidden_layers": 0}, "num_layers=0"),
    ({"hidden_size": 56}, "has shape"),
    ({"num_hidden_layers": 3}, r"missing \['model.layers.2"),
    ({"num_hidden_layers": 1}, r"not known \['model.layers.1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_FIELDS, ids=[next(iter(c)) for c, _ in BAD_FIELDS])
def test_a_config_that_cannot_be_held_is_refused_by_field(exported, changes, message):
    edit_config(exported, **changes)
    with pytest.raises(ValueError, match=message):
        open_folder(exported)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 1}, "sliding_window=1 must be at least 2"),
        ({"sliding_window": "all"}, "sliding_window='all' must be a whole number"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor=0.5"),
    ],
)
def test_mistral_fields_that_cannot_be_held(llama, loud, tmp_path, changes, message):
    model = loud(llama(family="mistral"))
    export_folder(tmp_path / "hf", config=model.config, tensors=native(model))
    edit_config(tmp_path / "hf", **changes)
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path / "hf")


def test_mistral_s_default_window_is_seen_when_the_field_is_absent(llama, loud, tmp_path):
    model = loud(llama(family="mistral"))
    export_folder(tmp_path / "hf", config=model.config, tensors=native(model))
    path = tmp_path / "hf" / "config.json"
    content = json.loads(path.read_text())
    del content["sliding_window"]
    path.write_text(json.dumps(content))
    assert open_folder(tmp_path / "hf").config.attention.window == 4095


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
    ],
)
def test_qwen_fields_that_cannot_be_held(llama, loud, tmp_path, family, changes, message):
    own = {"qwen2": "attention.qkv_bias", "qwen3": "attention.qk_norm"}[family]
    model = loud(llama(family=family, **{own: True}))
    export_folder(tmp_path / "hf", config=model.config, tensors=native(model))
    edit_config(tmp_path / "hf", **changes)
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path / "hf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.qkv_bias": True}, r"model\.attention\.qkv_bias=True.*LlamaForCausalLM"),
        ({"attention.qk_norm": True}, r"model\.attention\.qk_norm=True.*LlamaForCausalLM"),
        (
            {"rope.scaling": "ntk", "rope.original_seq_len": 8},
            r"model\.rope\.scaling='ntk'.*default, linear, llama3, yarn",
        ),
    ],
)
def test_what_llama_does_not_have_is_not_written(llama, changes, message):
    with pytest.raises(ValueError, match=message):
        family_named("llama").to_hf_config(llama(**changes))


def test_older_config_fields_are_read(exported):
    before = open_folder(exported).config
    path = exported / "config.json"
    content = json.loads(path.read_text())
    del content["rope_parameters"]
    path.write_text(json.dumps(content | {"rope_theta": 123.0, "partial_rotary_factor": 1.0, "head_dim": None}))
    after = open_folder(exported).config
    assert (after.rope.base, after.rope.fraction) == (123.0, 1.0)
    assert (after.head_dim, before.head_dim) == (12, 12)


def test_equal_lm_head_beside_tied_embeddings_and_stored_tables_are_harmless(llama, loud, tmp_path):
    model = loud(llama(tie_embeddings=True))
    export_folder(tmp_path / "hf", config=model.config, tensors=native(model))
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(tensors, path, metadata={"format": "pt"})
    assert "head.weight" not in open_folder(tmp_path / "hf").tensors.names()


def test_a_tied_head_that_differs_is_found_by_the_process_that_compares_its_rows(exported):
    edit_config(exported, tie_word_embeddings=True)
    tensors = load_file(exported / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, exported / "model.safetensors")
    assert open_folder(exported).tensors.problem() is None
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, exported / "model.safetensors")
    opened = open_folder(exported).tensors
    assert [opened.problem(part, 3) is None for part in range(3)] == [True, True, False]
    with pytest.raises(ValueError, match=r"tie_word_embeddings=True, but lm_head.weight differs"):
        open_weights(exported)


def test_pickles_are_refused_with_the_way_out(exported):
    torch.save({}, exported / "pytorch_model.bin")
    (exported / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle.*save_pretrained"):
        open_folder(exported)


def test_damaged_and_missing_files_are_named(exported, nemotron, loud, tmp_path):
    weights = exported / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        open_folder(exported)
    weights.unlink()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor"):
        open_folder(exported)
    (exported / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        open_folder(exported)
    (exported / "config.json").unlink()
    assert not is_folder(exported)
    with pytest.raises(ValueError, match=r"config.json is missing"):
        open_folder(exported)

    model = loud(nemotron())
    export_folder(tmp_path / "many", config=model.config, tensors=native(model), max_shard_bytes=20_000)
    first = sorted((tmp_path / "many").glob("model-*.safetensors"))[0]
    first.unlink()
    with pytest.raises(ValueError, match=f"{first.name} is missing"):
        open_folder(tmp_path / "many")


def test_an_index_may_not_point_outside_or_at_the_wrong_file(nemotron, loud, tmp_path):
    model = loud(nemotron())
    export_folder(tmp_path / "hf", config=model.config, tensors=native(model), max_shard_bytes=20_000)
    path = tmp_path / "hf" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = index["weight_map"]
    shutil.copy(tmp_path / "hf" / names["lm_head.weight"], tmp_path / "out.safetensors")
    path.write_text(json.dumps({"weight_map": names | {"lm_head.weight": "../out.safetensors"}}))
    with pytest.raises(ValueError, match="points outside its folder"):
        open_folder(tmp_path / "hf")
    wrong = names | {"lm_head.weight": names["model.embed_tokens.weight"]}
    path.write_text(json.dumps({"weight_map": wrong}))
    with pytest.raises(ValueError, match=r"looks for lm_head.weight in"):
        open_folder(tmp_path / "hf")


def test_quantised_weights_are_refused(exported):
    tensors = load_file(exported / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, exported / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight is stored as I8"):
        open_folder(exported)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "bert"}, "model.family='bert' is not one of nemotron4, llama, mistral"),
        ({"norm": "rmsnorm"}, "model.norm='rmsnorm' cannot be written as NemotronForCausalLM"),
        ({"mlp.activation": "swiglu"}, "model.mlp.activation='swiglu'"),
        ({"linear_bias": True}, "model.linear_bias=True"),
        ({"pattern": "*--", "num_layers": None}, r"model.pattern='\*--' cannot be written"),
        ({"rope.fraction": 0.0}, "model.rope.fraction=0.0"),
        ({"family": "llama"}, "model.norm='layernorm1p' cannot be written as LlamaForCausalLM"),
    ],
)
def test_models_that_the_architecture_cannot_hold_are_not_written(nemotron, loud, tmp_path, changes, message):
    config: ModelConfig = nemotron(**changes)
    with pytest.raises(ValueError, match=message):
        export_folder(tmp_path / "hf", config=config, tensors=native(loud(config)))
    assert list(tmp_path.iterdir()) == []


def test_mistral_has_its_window_in_every_layer(llama, loud, tmp_path):
    config = llama(**{"family": "mistral", "attention.window": 7, "attention.global_layers": [0]})
    with pytest.raises(
        ValueError, match=r"model.attention.global_layers=\[0\] cannot be written as MistralForCausalLM"
    ):
        export_folder(tmp_path / "hf", config=config, tensors=native(loud(config)))


def test_a_llama_that_transformers_would_refuse_is_written_as_mistral(llama, loud, tmp_path):
    config = llama(hidden_size=50)
    export_folder(tmp_path / "hf", config=config, tensors=native(loud(config)))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["MistralForCausalLM"]
    assert open_folder(tmp_path / "hf").config.hidden_size == 50


def test_wrong_tensors_and_taken_targets_leave_nothing_behind(nemotron, loud, tmp_path):
    model = loud(nemotron())
    tensors = native(model)
    target = tmp_path / "hf"
    short = {name: tensor for name, tensor in tensors.items() if name != "head.weight"}
    with pytest.raises(ValueError, match=r"missing \['head.weight'\], not known none"):
        export_folder(target, config=model.config, tensors=short)
    with pytest.raises(ValueError, match=r"not known \['extra'\]"):
        export_folder(target, config=model.config, tensors=tensors | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"final_norm.bias has shape \(1,\)"):
        export_folder(target, config=model.config, tensors=tensors | {"final_norm.bias": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        export_folder(target, config=model.config, tensors=tensors)
    assert [path.name for path in tmp_path.rglob("*")] == ["hf", "mine.txt"]
