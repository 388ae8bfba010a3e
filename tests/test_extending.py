"""The three extensions of docs/extending.md, each made with what that page names and nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import yaml
from omegaconf import MISSING
from torch import Tensor
from transformers import AutoModelForCausalLM

import megatron_lite
from megatron_lite.config.compose import register_schema
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.huggingface.family import Family, number, read_sizes, written_sizes
from megatron_lite.models.huggingface.registry import FAMILIES
from megatron_lite.models.huggingface.rope import read_rope
from megatron_lite.models.huggingface.rules import transformer_rules
from megatron_lite.objectives.base import Loss, Objective, ObjectiveConfig
from tests import runs
from tests.hf_folders import command

# ------------------------------------------------------------------ a dense family: one config, one mapping

STABLE_TINY = {
    "family": "stablelm", "num_layers": 2, "hidden_size": 32, "attention": {"heads": 4, "kv_heads": 2},
    "mlp": {"ffn_size": 64, "activation": "swiglu"}, "vocab_size": 384, "max_seq_len": 128, "norm": "layernorm",
    "rope": {"fraction": 0.25},
}  # fmt: skip
REQUIRED: dict[str, Any] = {"norm": "layernorm", "mlp.activation": "swiglu", "linear_bias": False}


def write_config(config: ModelConfig) -> dict[str, Any]:
    sizes = written_sizes(config)
    del sizes["head_dim"]  # StableLM's is hidden_size / num_heads
    sizes["rope_parameters"]["partial_rotary_factor"] = config.rope.fraction
    own = {"hidden_act": "silu", "layer_norm_eps": config.norm_eps, "use_qkv_bias": False, "qk_layernorm": False}
    return sizes | own | {"use_parallel_residual": False, "partial_rotary_factor": config.rope.fraction}


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    sizes = read_sizes(hf, activation="swiglu")
    eps = number(hf, "layer_norm_eps")
    return ModelConfig(
        family="stablelm", norm="layernorm", norm_eps=eps, rope=read_rope(hf, default_fraction=0.25), **sizes
    )


STABLELM = Family(
    name="stablelm",
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    required=REQUIRED,
    defaults={"layer_norm_eps": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": False, "hidden_act": "silu"},
    only={
        "hidden_act": ("silu",),
        "use_qkv_bias": (False, None),
        "qk_layernorm": (False, None),
        "use_parallel_residual": (False, None),
    },
    write_config=write_config,
    read_config=read_config,
    rules=transformer_rules,
)


def test_a_dense_family(tiny_data, tmp_path, monkeypatch):
    """transformers' StableLM: LayerNorm, SwiGLU, a quarter of each head rotates; not among the families that come with us."""
    monkeypatch.setitem(FAMILIES, "stablelm", STABLELM)
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "stable_tiny.yaml").write_text(yaml.safe_dump(STABLE_TINY))
    (tmp_path / "own" / "data").symlink_to(tiny_data / "data")
    tiny = [word for word in runs.TINY if not word.startswith("model")]
    command(
        "train", "--config-dir", str(tmp_path / "own"), *tiny, "model=stable_tiny", "train.max_steps=6",
        f"run.dir={tmp_path / 'r'}",
    )  # fmt: skip
    assert runs.rows(tmp_path / "r")[-1]["loss"] < runs.rows(tmp_path / "r")[0]["loss"]

    command("convert", f"source={tmp_path / 'r'}", f"target={tmp_path / 'hf'}", "to=hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert type(theirs).__name__ == "StableLmForCausalLM"
    ours, _ = megatron_lite.load(tmp_path / "r")
    tokens = torch.randint(0, 384, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (ours(tokens) - theirs(tokens).logits).abs().max() / ours(tokens).std()
        assert difference < 1e-4  # fp32 rounding is about 1e-6 of the spread, a wrong rotation about 1
        again, _ = megatron_lite.load(tmp_path / "hf")
        assert torch.equal(again(tokens), ours(tokens))


# ------------------------------------------------------------------ a data source: config only


def test_a_data_source(tiny_data, tmp_path):
    """A fourth source, tokenized elsewhere, joins the blend by a few lines of YAML in a folder of one's own."""
    draw = random.Random(1)
    letters = [" ".join(draw.choices("abcdefg", k=40)) for _ in range(100)]
    runs.write_source(tmp_path / "letters", load_tokenizer(tiny_data / "tokenizer"), letters)
    (tmp_path / "data").mkdir()
    group = {"weight": 0.5, "sources": {"letters": {"path": str(tmp_path / "letters")}}}
    own = {"defaults": ["tiny", "_self_"], "groups": {"letters": group}, "phases": []}
    (tmp_path / "data" / "with_letters.yaml").write_text(yaml.safe_dump(own))
    (tmp_path / "data" / "tiny.yaml").symlink_to(tiny_data / "data" / "tiny.yaml")
    assert runs.run(tmp_path, tmp_path / "r", "data=with_letters", "train.max_steps=6") == 0
    seen = runs.status(tmp_path / "r")["blend_seen"]
    assert seen["letters/letters"]["samples"] == 16  # a third of 48: its weight is 0.5 of 1.5
    assert sum(source["samples"] for source in seen.values()) == 48


# ------------------------------------------------------------------ an objective: one file


@dataclass
class QuietHiddenConfig(ObjectiveConfig):
    """weight: what the mean square of a hidden state counts beside a token's cross-entropy."""

    weight: float = MISSING

    def validate(self) -> None:
        if self.weight < 0:
            raise ValueError(f"objective.weight={self.weight} must not be negative")

    def build(self, decoder: Decoder) -> Objective:
        return QuietHidden(decoder, self.weight)


class QuietHidden(Objective):
    """Next-token loss, and `weight` times the mean square of the final hidden states of every counted token."""

    def __init__(self, decoder: Decoder, weight: float) -> None:
        super().__init__(decoder)
        self.weight = weight

    def loss(self, batch: dict[str, Tensor]) -> Loss:
        x_BTD = self.hidden(batch)
        cross_entropy = self.cross_entropy(x_BTD, batch)
        loudness = (x_BTD.float().square().mean(dim=-1) * batch["loss_mask"]).sum()
        parts = {"cross_entropy": cross_entropy.detach(), "loudness": loudness.detach()}
        return Loss(cross_entropy + self.weight * loudness, torch.count_nonzero(batch["loss_mask"]), parts)


@pytest.fixture
def own(tiny_data, tmp_path):
    """A folder of one's own with the objective's file; `--config-dir` names it."""
    register_schema("quiet_hidden", QuietHiddenConfig, group="objective")
    (tmp_path / "own" / "objective").mkdir(parents=True)
    (tmp_path / "own" / "data").symlink_to(tiny_data / "data")
    (tmp_path / "own" / "objective" / "quiet.yaml").write_text("defaults: [quiet_hidden_schema, _self_]\n")
    return tmp_path / "own"


def loud(run_dir) -> float:
    model, tokenizer = megatron_lite.load(run_dir)
    with torch.no_grad():
        return model.hidden(torch.tensor([tokenizer("the model reads every word")["input_ids"]])).square().mean().item()


def test_an_objective(own, straight, tmp_path):
    for name, weight in (("same", 0.0), ("other", 1.0)):
        keys = ("objective=quiet", f"objective.weight={weight}", "train.stop_at=10", "train.eval_every=10")
        assert runs.run(own, tmp_path / name, *keys) == 0
    assert runs.curve(tmp_path / "same") == runs.curve(straight)[:10]  # with weight 0 it is the other objective
    # LayerNorm makes the mean square of a fresh model 1, less what norm_eps=1e-5 is beside a variance of some 4e-4
    row, plain = (runs.rows(directory)[0] for directory in (tmp_path / "other", straight))
    assert row["loss"] - plain["loss"] == pytest.approx(1.0, abs=0.04)
    assert row["loss"] == pytest.approx(row["cross_entropy"] + row["loudness"], rel=1e-6)  # fp32 sums of 256 tokens
    assert row["cross_entropy"] == plain["loss"]
    assert loud(tmp_path / "other") < 0.9 * loud(tmp_path / "same")


def test_validation_is_the_cross_entropy_whatever_is_minimized(own, tmp_path, capsys):
    keys = ("objective=quiet", "objective.weight=1", "train.stop_at=4", "train.eval_every=4")
    assert runs.run(own, tmp_path / "r", *keys) == 0
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    logged = next(line["val_loss"] for line in lines if "val_loss" in line)
    assert command("evaluate", f"checkpoint={tmp_path / 'r'}", "json=true") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["val_loss"] == logged


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=guess"], "objective.*guess"),
        (["+objective.weight=1"], "objective.weight"),
        (["objective=quiet", "objective.wieght=1"], "wieght"),
        (["objective=quiet"], "weight"),
        (["objective=quiet", "objective.weight=-1"], "objective.weight=-1"),
    ],
)
def test_an_objective_that_is_not_there(overrides, message, own, tmp_path):
    with pytest.raises(ValueError, match=message):
        runs.run(own, tmp_path / "r", *overrides)
