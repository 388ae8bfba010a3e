"""Conversion through the command: both round trips to the byte, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from megatron_lite.checkpoint import CheckpointConfig, CheckpointStore
from megatron_lite.checkpoint.opening import load_tensors
from megatron_lite.config.compose import to_dict
from megatron_lite.data.tokenizer import fingerprint
from megatron_lite.errors import CheckpointError
from megatron_lite.narrowing import narrow
from megatron_lite.weights import load, open_weights
from tests import runs
from tests.engine.harness import manifest_state
from tests.hf_folders import command, make_folder
from tests.models.conftest import llama_config, loud_decoder

# Two spellings of the same values: which of them a config.json has depends on the version of transformers that wrote it.
SPELLINGS = {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "dtype", "torch_dtype"}


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(folder) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def convert(source, target, to, *more):
    assert command("convert", f"source={source}", f"target={target}", f"to={to}", *more) == 0
    return target


def test_a_tokenizer_that_transformers_reads_otherwise_is_named(tiny_data, tmp_path, capsys):
    """Of a Qwen2 it takes vocabulary and merges, and splits texts as Qwen2 does."""
    words = {
        "family": "qwen2",
        "norm": "rmsnorm",
        "mlp.activation": "swiglu",
        "attention.qkv_bias": True,
        "vocab_size": 384,
    }
    decoder = loud_decoder(llama_config(**words))
    tensors = {f"model.{name}": parameter.detach() for name, parameter in decoder.named_parameters()}
    said = {"config": {"model": to_dict(decoder.config), "data": {"tokenizer": str(tiny_data / "tokenizer")}}}
    state = manifest_state({"adam_step": 0}) | said | {"tokenizer": fingerprint(tiny_data / "tokenizer")}
    CheckpointStore(tmp_path / "run" / "checkpoints", CheckpointConfig()).save(1, tensors, state)
    target = convert(tmp_path / "run", tmp_path / "hf", "hf")
    assert "AutoTokenizer" in capsys.readouterr().out
    assert fingerprint(AutoTokenizer.from_pretrained(target)) != fingerprint(tiny_data / "tokenizer")
    assert fingerprint(PreTrainedTokenizerFast.from_pretrained(target)) == fingerprint(tiny_data / "tokenizer")


@pytest.mark.parametrize("kind", ["nemotron", "llama", "mistral"])
@pytest.mark.parametrize(
    ("dtype", "shard"), [(torch.float32, "1GB"), (torch.bfloat16, "30KB")], ids=["fp32", "bf16_in_shards"]
)
def test_hf_native_hf(kind, dtype, shard, tiny_data, tmp_path):
    source = make_folder(tmp_path / "in", kind, dtype=dtype, shard=shard, tokenizer=tiny_data / "tokenizer")
    GenerationConfig(temperature=0.5, do_sample=True, eos_token_id=[0, 5], pad_token_id=3).save_pretrained(source)
    native = convert(source, tmp_path / "native", "native")
    back = convert(native, tmp_path / "back", "hf")

    before, after = tensors(source), tensors(back)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    config, again = (json.loads((folder / "config.json").read_text()) for folder in (source, back))
    for key, value in config.items():
        if key not in SPELLINGS:
            assert again[key] == value, key
    assert config["eos_token_id"] == [0, 5]
    generation = [json.loads((folder / "generation_config.json").read_text()) for folder in (source, back)]
    assert generation[0] == generation[1]
    for file in (tiny_data / "tokenizer").iterdir():
        assert (back / file.name).read_bytes() == file.read_bytes()
    # nothing is lost on the way through the native form: the same bytes as without it, and again as often as you like
    assert files(back) == files(convert(source, tmp_path / "direct", "hf"))
    assert files(back) == files(convert(convert(back, tmp_path / "native2", "native"), tmp_path / "back2", "hf"))


@pytest.mark.parametrize("shards", [[], ["max_shard_gb=0.00002"]], ids=["one_file", "shards"])
def test_native_hf_native(shards, tiny_data, tmp_path):
    run = tmp_path / "run"  # 400 words are padded to 512 rows
    runs.run(tiny_data, run, "model.vocab_size=400", "train.max_steps=2")
    exported = convert(run, tmp_path / "hf", "hf", *shards)
    assert (len(list(exported.glob("*.safetensors"))) > 1) == bool(shards)
    native = convert(exported, tmp_path / "native", "native")
    first, second = open_weights(run), open_weights(native)
    assert first.config == second.config
    assert first.tokenizer_fingerprint == second.tokenizer_fingerprint
    weights = {name: t for name, t in load_tensors(first.path) if name.startswith("model.")}
    again = dict(load_tensors(second.path))
    assert weights.keys() == again.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, again[name]), name
    assert files(exported) == files(convert(native, tmp_path / "hf2", "hf", *shards))


def test_transformers_loads_an_exported_run_and_agrees(straight, tmp_path):
    folder = convert(straight, tmp_path / "hf", "hf")
    model, tokenizer = load(straight)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(folder)("the model reads text")["input_ids"]])
    assert tokens.tolist() == [tokenizer("the model reads text")["input_ids"]]
    with torch.no_grad():
        difference = (model(tokens) - theirs(tokens).logits).abs().max() / model(tokens).std()
    assert difference < 1e-4  # fp32 rounding is about 1e-6 of the logits' spread
    assert theirs.config.eos_token_id == tokenizer.eos_token_id


def test_dtype_casts_once(straight, tmp_path):
    folder = convert(straight, tmp_path / "hf", "hf", "dtype=bf16")
    full, half = tensors(convert(straight, tmp_path / "full", "hf")), tensors(folder)
    for name, tensor in full.items():
        assert torch.equal(tensor.bfloat16(), half[name])
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("to", ["hf", "native"])
@pytest.mark.parametrize(
    ("value", "lost"),
    [(-70_000.0, r"1 of 2080 values of layers\.3\."), (None, r"2080 of 2080 values of layers\.3\..* become zero")],
    ids=["overflow", "underflow"],
)
def test_a_cast_that_loses_values_is_refused(value, lost, to, tmp_path):
    source = make_folder(tmp_path / "in", "llama")
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if value is None:
        weights[name] *= 1e-9
    else:
        weights[name][3, 5] = value
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, CheckpointError), match=f"{lost}.*fp32"):
        convert(source, tmp_path / "out", to, "dtype=fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    convert(source, tmp_path / "out", to, "dtype=bf16")


def test_infinities_of_the_source_are_not_the_casts_doing(tmp_path):
    values = torch.tensor([float("inf"), float("nan"), 1e-9, *range(1, 200)])
    assert torch.equal(narrow("w", values, torch.float16).nan_to_num(), values.half().nan_to_num())
    with pytest.raises(ValueError, match=r"1 of 2 values of w .*float32"):  # a folder in float64, loaded in fp32
        narrow("w", torch.tensor([1.0, 1e300], dtype=torch.float64), torch.float32)


def test_a_folder_without_a_tokenizer(tmp_path, capsys):
    source = make_folder(tmp_path / "in", "llama")
    native = convert(source, tmp_path / "native", "native")
    assert load(native)[1] is None
    convert(native, tmp_path / "back", "hf")
    assert "no tokenizer beside the source" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, "rope_parameters.*dynamic"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"model_type": "mixtral"}, "model_type='mixtral'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
@pytest.mark.parametrize("to", ["native", "hf"])
def test_a_config_that_cannot_be_held_is_refused_naming_the_field(changes, message, to, tmp_path):
    source = make_folder(tmp_path / "in", "llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["to=onnx"], "to=onnx is unknown; choose hf or native"),
        (["dtype=int8"], "dtype=int8 is unknown"),
        (["max_shard_gb=0"], "max_shard_gb=0.0 must be above 0"),
        (["source=nowhere"], "nowhere does not exist"),
    ],
)
def test_wrong_keys(overrides, message, straight, tmp_path):
    with pytest.raises(ValueError, match=message):
        command("convert", f"source={straight}", f"target={tmp_path}/out", *overrides)


@pytest.mark.parametrize("to", ["native", "hf"])
def test_nothing_is_written_over(to, straight, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(ValueError, match="exists and is not"):
        convert(straight, tmp_path / "out", to)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
