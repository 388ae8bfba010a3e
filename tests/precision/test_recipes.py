"""Which layers are FP8, and which recipes and sizes are refused, with what to do instead."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.quantization import check_sizes, formats_table, linear_layers, quantize
from megatron_lite.precision.numerics import Numerics, numerics_of
from megatron_lite.precision.recipes import RECIPES
from megatron_lite.training.config import compose_run, validate
from tests.model_configs import model_config

MODEL = model_config(
    {"family": "nemotron4", "num_layers": 2, "hidden_size": 64, "mlp.ffn_size": 248, "attention.heads": 4, "attention.kv_heads": 2,
     "vocab_size": 128, "max_seq_len": 64}
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "numbers", "says"),
    [
        ("fp8_current", {"name": "fp8_block"}, "precision=fp8_block"),
        ("fp8_current", {"amax": "dp"}, r"precision\.amax=dp"),
        ("fp8_current", {"backend": "cuda"}, r"precision\.backend=cuda"),
        ("fp8_current", {"bf16_last_layers": -1}, r"precision\.bf16_last_layers=-1"),
        ("fp8_block", {"format": "e5m2"}, r"precision\.format=e5m2.*emulated"),
        ("fp8_block", {"format": "e3m4"}, r"precision\.format=e3m4"),
        ("fp8_delayed", {"amax": "local"}, r"precision\.amax=local.*fp8_current"),
        ("fp8_delayed", {"amax_compute": "mean"}, r"precision\.amax_compute=mean"),
        ("fp8_delayed", {"amax_history_len": 0}, r"precision\.amax_history_len=0"),
        ("fp8_delayed", {"margin": 99}, r"precision\.margin=99"),
    ],
)
def test_values_that_are_refused(name: str, numbers: dict[str, object], says: str) -> None:
    RECIPES[name]().validate()
    with pytest.raises(ValueError, match=says):
        RECIPES[name](**numbers).validate()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["precision=nvfp4"], "nvfp4.*mxfp8"),
        (["precision=fp8_delayed", "parallel.recompute=full"], "fp8_delayed.*recompute=full.*fp8_current"),
        (["precision=fp8_delayed", "parallel.compile=true"], "fp8_delayed.*compile=true.*fp8_current"),
        (
            ["precision=fp8_current", "model=hymba_tiny", "model.meta_tokens=3", "train.micro_batch_size=1"],
            r"259 tokens.*16.*meta_tokens",
        ),
        (["precision=fp8_block", "model.mlp.ffn_size=1992"], r"1992 does not divide by 16.*bf16_modules.*emulated"),
    ],
)
def test_runs_that_are_refused(words: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        validate(compose_run(["experiment=smoke", "model=nemotron4_tiny", *words]), 1)


def test_sizes() -> None:
    with pytest.raises(ValueError, match=r"layers\.1\.mixer\.up.*248 does not divide by 16"):
        check_sizes(MODEL, RECIPES["fp8_block"](), tp=1, tokens=64)
    check_sizes(MODEL, RECIPES["fp8_block"](backend="emulated"), tp=1, tokens=7)
    but_mlp = {"bf16_modules": ["layers.*.up", "layers.*.down"]}
    check_sizes(MODEL, RECIPES["fp8_block"](**but_mlp), tp=2, tokens=64)
    with pytest.raises(ValueError, match=r"48 tokens.*32"):
        check_sizes(MODEL, RECIPES["mxfp8"](**but_mlp), tp=1, tokens=48)
    with pytest.raises(ValueError, match=r"layers\.\*\.uq.*layers\.0\.mixer\.qkv, layers\.0\.mixer\.out"):
        check_sizes(MODEL, RECIPES["mxfp8"](bf16_modules=["layers.*.uq"]), tp=1, tokens=64)


def test_some_layer_must_be_fp8() -> None:
    with pytest.raises(ValueError, match=r"bf16_first_layers=3, bf16_last_layers=1.*4 layers.*precision=bf16"):
        formats_table(MODEL, RECIPES["fp8_block"](bf16_first_layers=3, bf16_last_layers=1))


def test_sizes_of_the_9b_model() -> None:
    run = compose_run(["model=nemotron_nano2_9b", "precision=fp8_block"])
    with pytest.raises(ValueError, match=r"layers\.1\.mixer\.up is 1960 x 4480.*parallel\.tp=1 or 2 or 4 would work"):
        check_sizes(run.model, run.precision, tp=8, tokens=8192)
    check_sizes(run.model, run.precision, tp=4, tokens=8192)
    run.precision.bf16_modules = ["layers.*.mixer.up", "layers.*.mixer.down"]
    check_sizes(run.model, run.precision, tp=8, tokens=8192)


def test_which_layers() -> None:
    """Nano 2's choice: the first and last two layers stay bf16, four matrices each side of them."""
    words = ["bf16_first_layers=2", "bf16_last_layers=2", "bf16_modules=[*.out]"]
    run = compose_run(["model=nano2_tiny", "precision=fp8_block", *(f"precision.{word}" for word in words)])
    with torch.device("meta"):
        decoder = Decoder(run.model)
    quantize(decoder, run.precision, Mesh())
    last = len(decoder.layers) - 2
    chosen = linear_layers(decoder, run.precision)
    for path, is_fp8 in chosen.items():
        assert is_fp8 == (2 <= int(path.split(".")[1]) < last and not path.endswith(".out")), path
        assert hasattr(decoder.get_submodule(path), "quantizers") == is_fp8
    assert any(chosen.values())
    assert all(
        not hasattr(module, "quantizers") for module in (decoder.embedding, decoder.head, decoder.layers[2].norm)
    )
    assert numerics_of(decoder).paths == [path for path, is_fp8 in chosen.items() if is_fp8]
    table = formats_table(run.model, run.precision)
    assert len(table) <= 11  # kinds of layers, not layers
    assert sum(int(line.split(" x ")[0]) for line in table[:-1]) == len(chosen)
    assert any("E4M3" in line and "Mamba2.in_proj" in line for line in table)


def test_without_fp8_nothing_is_there() -> None:
    with torch.device("meta"):
        decoder = Decoder(MODEL)
    numerics = numerics_of(decoder)
    assert (type(numerics), numerics.tensors(), numerics.rungs) == (Numerics, {}, ())


def test_the_backend_follows_the_device() -> None:
    recipe = RECIPES["fp8_current"]()
    assert recipe.backend_on(torch.device("cuda")) == "transformer_engine"
    assert recipe.backend_on(torch.device("cpu")) == "emulated"
