"""Counts against the papers' own numbers and against shapes counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from megatron_lite.config.compose import from_dict
from megatron_lite.models import Decoder, ModelConfig
from megatron_lite.models.flops import flops_per_token, parameter_count

CONFIGS = Path(__file__).parents[2] / "configs" / "model"


def load(name: str) -> ModelConfig:
    return from_dict(ModelConfig, yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))


def test_nemotron4_15b_has_exactly_the_published_shapes():
    config = load("nemotron4_15b")
    with torch.device("meta"):
        model = Decoder(config)
    assert sum(p.numel() for p in model.parameters()) == 15_628_775_424
    assert parameter_count(config) == 15_628_775_424
    assert len(model.layers) == 64
    assert config.symbols == "*-" * 32
    assert all(p.is_meta for p in model.parameters())


# Published, or counted from published shapes (see the files): SmolLM2's and Mistral NeMo's config.json, arXiv 2408.11796 and 2407.14679,
# NVIDIA's configs of Nemotron Nano 2.
SIZES = {
    "smollm2_135m": 134_515_008, "mistral_nemo_12b": 12_247_782_400, "minitron_8b": 8_414_105_600, "minitron_4b": 4_190_509_056,
    "nemotron4_minitron_8b": 8_271_699_968, "nemotron_nano2_12b": 12_310_001_152, "nemotron_nano2_9b": 8_888_227_328,
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    assert parameter_count(load(name)) == SIZES[name]


def test_nano2_has_its_published_layers():
    assert [load("nemotron_nano2_12b").symbols.count(symbol) for symbol in "M-*"] == [28, 28, 6]
    nine = load("nemotron_nano2_9b").symbols
    assert [nine.count(symbol) for symbol in "M-*"] == [27, 25, 4]
    assert [index for index, symbol in enumerate(nine) if symbol == "*"] == [14, 21, 30, 39]


def test_count_leaves_out_padding(nemotron):
    assert parameter_count(nemotron(vocab_multiple=1)) == parameter_count(nemotron(vocab_multiple=1000))


# Nemotron-4 (arXiv 2402.16819), Table 2: GPUs, seconds an iteration, MFU in percent, sequences a batch
TABLE_2 = [(768, 0.57, 34.3, 384), (1536, 0.58, 33.3, 768), (2304, 0.64, 30.5, 1152)]


@pytest.mark.parametrize(("gpus", "seconds", "mfu", "sequences"), TABLE_2)
def test_formula_reproduces_the_mfu_column_of_nemotron_4(gpus, seconds, mfu, sequences):
    flops = flops_per_token(load("nemotron4_15b"), seq_len=4096) * 4096 * sequences
    # iteration times are printed with two digits, which is 0.3 points of MFU
    assert 100 * flops / (seconds * gpus * 989e12) == pytest.approx(mfu, abs=0.3)


def test_tied_embeddings_count_once_as_the_head(llama):
    tied, untied = llama(tie_embeddings=True), llama(tie_embeddings=False)
    assert flops_per_token(tied, 32) == flops_per_token(untied, 32)
    assert parameter_count(untied) - parameter_count(tied) == untied.vocab_size * untied.hidden_size


def test_flops_by_hand(nemotron):
    config = nemotron()
    block = 48 * (4 + 2 * 2) * 12 + 4 * 12 * 48 + 2 * 48 * 80 + 4 * 48
    matrices = 2 * block + 2 * 48 + 101 * 48
    assert flops_per_token(config, 16) == 6 * matrices + 12 * 2 * 4 * 12 * 16
