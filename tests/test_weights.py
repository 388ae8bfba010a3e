"""Starts from given weights, and `load`: what is taken over, what begins anew, what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import megatron_lite
from megatron_lite.checkpoint.opening import find_checkpoint, load_tensors
from megatron_lite.commands import train as training
from megatron_lite.data.blend import open_blend
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.training.build import build_engine, build_schedule
from megatron_lite.training.config import compose_run, validate
from megatron_lite.training.data import open_tokenizer
from megatron_lite.training.resume import open_source
from megatron_lite.weights import open_weights
from tests import runs
from tests.hf_folders import command, make_folder, metaspace_tokenizer


def config(data, run_dir, *overrides):
    """A tiny run whose model is the source's: no model key on the command line."""
    arguments = [a for a in runs.arguments(data, run_dir, *overrides) if not a.startswith("model")]
    return compose_run(arguments)


def train(data, run_dir, *overrides) -> int:
    with runs.undrawn():
        return training.train(config(data, run_dir, *overrides))


def saved(run_dir) -> dict[str, torch.Tensor]:
    return dict(load_tensors(find_checkpoint(run_dir)))


def manifest(run_dir) -> dict:
    return json.loads((find_checkpoint(run_dir) / "manifest.json").read_text())


def engine_started_from(data, source, *overrides):
    run = config(data, "unused", f"init_from={source}", *overrides)
    run.model = open_weights(source).config
    return build_engine(run, Mesh(), source=open_source(run, open_tokenizer(run.data)))


@pytest.mark.parametrize("kind", ["nemotron", "llama", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_folder_is_imported_trained_and_exported(kind, dtype, tiny_data, tmp_path):
    """The first loss is transformers' own on the run's first samples, so weights and data begin where they should."""
    folder = make_folder(tmp_path / "hf", kind, dtype=dtype, shard="30KB", tokenizer=tiny_data / "tokenizer")
    run_dir = tmp_path / "run"
    keys = (f"init_from={folder}", "train.max_steps=2", "data.reset_attention=false")
    assert train(tiny_data, run_dir, *keys) == 0
    first = runs.rows(run_dir)[0]
    assert (first["step"], first["consumed_samples"]) == (1, 8)
    assert first["lr"] == pytest.approx(1e-2 / 2)  # the first of two warm-up steps

    run = config(tiny_data, run_dir, *keys)
    horizon = build_schedule(run).end.consumed_samples
    blend = open_blend(run.data, tokenizer=open_tokenizer(run.data), seed=run.seed, total_samples=horizon)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    examples = [blend[i] for i in range(8)]
    tokens, targets = (torch.stack([torch.from_numpy(e[key]) for e in examples]) for key in ("tokens", "targets"))
    with torch.no_grad():
        expected = F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten()).item()
    assert first["loss"] == pytest.approx(expected, rel=1e-5)  # fp32 rounding over 256 tokens

    assert command("convert", f"source={run_dir}", f"target={tmp_path}/out", "to=hf") == 0
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(back) is type(theirs)
    moved = [not torch.equal(a, b) for a, b in zip(theirs.parameters(), back.parameters())]
    assert all(moved)


def test_weights_only_takes_the_weights_and_nothing_else(tiny_data, straight):
    engine, source = engine_started_from(tiny_data, straight), saved(straight)
    assert engine.state().counters == {"adam_step": 0}
    for key, piece in engine.state().tensors.items():
        kind = key.split(".", 1)[0]
        assert torch.equal(piece.local, source[key] if kind == "model" else torch.zeros_like(source[key])), key


def test_optimizer_true_keeps_the_moments(tiny_data, straight):
    engine, source = engine_started_from(tiny_data, straight, "init_from.optimizer=true"), saved(straight)
    assert engine.state().counters == manifest(straight)["counters"] == {"adam_step": 20}
    for key, piece in engine.state().tensors.items():
        assert torch.equal(piece.local, source[key]), key


def test_every_counter_begins_at_zero(tiny_data, straight, tmp_path):
    train(tiny_data, tmp_path / "r", f"init_from={straight}", "init_from.optimizer=true", "train.max_steps=4")
    rows, first = runs.rows(tmp_path / "r"), runs.rows(straight)
    for key in ("step", "consumed_samples", "lr"):
        assert [row[key] for row in rows[:2]] == [row[key] for row in first[:2]]
    assert rows[0]["loss"] < first[0]["loss"] - 1  # of the trained model
    assert manifest(tmp_path / "r")["consumed_samples"] == 32


@pytest.mark.parametrize("optimizer", ["false", "true"])
def test_a_resume_never_reads_the_source_again(optimizer, tiny_data, straight, copy_of, tmp_path):
    source = copy_of(straight)
    keys = (f"init_from={source}", f"init_from.optimizer={optimizer}", "train.max_steps=8")
    train(tiny_data, tmp_path / "whole", *keys)
    train(tiny_data, tmp_path / "parts", *keys, "train.stop_at=4")
    shutil.rmtree(source)
    assert train(tiny_data, tmp_path / "parts", *keys) == 0
    assert runs.curve(tmp_path / "parts") == runs.curve(tmp_path / "whole")
    whole, parts = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert all(torch.equal(tensor, parts[key]) for key, tensor in whole.items())


def test_the_model_comes_from_the_source(tiny_data, straight, tmp_path):
    train(tiny_data, tmp_path / "r", f"init_from={straight}", "train.max_steps=2")
    assert manifest(tmp_path / "r")["config"]["model"] == manifest(straight)["config"]["model"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.mlp.ffn_size=128"], r"layers.1.mixer.up.weight has shape \(64, 32\) there and \(128, 32\) here"),
        (["model.tie_embeddings=true"], "tensors on one side only: head.weight"),
        (
            ["model.family=llama", "model.norm=rmsnorm", "model.mlp.activation=swiglu", "model.rope.fraction=1"],
            "final_norm.bias",
        ),
    ],
)
def test_another_model_is_refused_by_name_and_shape(overrides, message, tiny_data, straight, tmp_path):
    with pytest.raises(ValueError, match=message):
        runs.run(tiny_data, tmp_path / "r", f"init_from={straight}", *overrides)
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


def test_a_source_without_optimizer_cannot_give_one(tiny_data, tmp_path):
    folder = make_folder(tmp_path / "hf", "llama")
    with pytest.raises(ValueError, match=r"init_from.optimizer=true, but .* holds no optimizer state"):
        train(tiny_data, tmp_path / "r", f"init_from={folder}", "init_from.optimizer=true")


def test_the_source_decides_how_long_a_window_may_be(tiny_data, tmp_path):
    folder = make_folder(tmp_path / "hf", "llama", max_position_embeddings=16)
    with pytest.raises(ValueError, match=r"data.seq_len=32 is longer than model.max_seq_len=16"):
        train(tiny_data, tmp_path / "r", f"init_from={folder}")
    # and the default model, which is not meant, decides nothing: its max_seq_len is 2048
    validate(config(tiny_data, tmp_path / "r", f"init_from={folder}", "data.seq_len=4000"), 1)


def test_weights_of_another_tokenizer_are_warned_about(tiny_data, tmp_path):
    other = metaspace_tokenizer(tmp_path / "tokenizer")
    folder = make_folder(tmp_path / "hf", "llama", tokenizer=other)
    with pytest.warns(UserWarning, match="was trained with tokenizer"):
        train(tiny_data, tmp_path / "r", f"init_from={folder}", "train.max_steps=2")


def test_converted_weights_are_no_run_to_go_on_with(tiny_data, straight, tmp_path):
    command("convert", f"source={straight}", f"target={tmp_path}/native", "to=native")
    with pytest.raises(ValueError, match="holds converted weights and no training state"):
        runs.run(tiny_data, tmp_path / "native")
    assert train(tiny_data, tmp_path / "r", f"init_from={tmp_path}/native", "train.max_steps=2") == 0


def test_load_gives_model_and_tokenizer(straight, tmp_path):
    model, tokenizer = megatron_lite.load(straight)
    checkpoint, _ = megatron_lite.load(straight / "checkpoints" / "step_00000020")
    tokens = torch.tensor([tokenizer("the model")["input_ids"]])
    assert not model.training
    assert torch.equal(model(tokens), checkpoint(tokens))
    folder = make_folder(tmp_path / "hf", "mistral", dtype=torch.bfloat16)
    model, tokenizer = megatron_lite.load(folder)
    assert tokenizer is None
    assert model.embedding.weight.dtype == torch.float32


def test_a_run_that_moved_has_its_tokenizer_with_it(straight, copy_of, tiny_data):
    run_dir = copy_of(straight)
    assert open_weights(run_dir).tokenizer == run_dir / "tokenizer"
    shutil.rmtree(run_dir / "tokenizer")
    assert open_weights(run_dir).tokenizer == tiny_data / "tokenizer"  # the folder that the config named


def test_only_the_tokenizer_is_copied_into_a_run(tiny_data, tmp_path):
    """A tokenizer is often named by the folder of a whole model: its weights stay where they are."""
    folder = make_folder(tmp_path / "hf", "llama", tokenizer=tiny_data / "tokenizer")
    runs.run(tiny_data, tmp_path / "r", "train.max_steps=2", f"data.tokenizer={folder}")
    copied = {path.name for path in (tmp_path / "r" / "tokenizer").iterdir()}
    assert copied == {path.name for path in (tiny_data / "tokenizer").iterdir()}


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda path: None, "does not exist"), (lambda path: path.mkdir(), "is not a checkpoint")],
)
def test_what_holds_no_weights_is_refused(make, message, tmp_path):
    make(tmp_path / "x")
    with pytest.raises(ValueError, match=message):
        megatron_lite.load(tmp_path / "x")


def test_an_unknown_family_is_refused_before_anything_is_made(tiny_data, tmp_path):
    with pytest.raises(ValueError, match=r"model.family='gpt9' is not one of nemotron4, llama, mistral"):
        runs.run(tiny_data, tmp_path / "r", "model.family=gpt9")
    assert not (tmp_path / "r").exists()
