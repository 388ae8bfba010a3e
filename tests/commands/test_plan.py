"""`mlite plan`: sizes and shapes of full-size models, without memory."""

from __future__ import annotations

import json

import pytest

from megatron_lite.planner.shapes import local_shapes
from tests.hf_folders import command


def test_a_full_size_model(capsys):
    assert command("plan", "model=nemotron_nano2_12b", "parallel.tp=8", "seq_len=8192") == 0
    printed = capsys.readouterr().out
    assert "12,310,001,152 parameters" in printed
    assert "62 layers: 28 Mamba-2, 28 feed-forward, 6 attention" in printed
    row = next(line for line in printed.splitlines() if "layers.0.mixer.in_proj.weight" in line)
    # z and x of 10240, B and C of 8 x 128, dt of 128; an eighth of them are one group's
    assert [word.strip() for word in row.split("│")[2:5]] == ["28 x", "22656 x 5120", "2832 x 5120"]


def test_the_shapes_are_those_of_a_rank(hybrid_tiny):
    infos, local = local_shapes(hybrid_tiny, tp=2)
    assert local["layers.0.mixer.ssm.A_log"] == (4,)
    assert infos["layers.0.mixer.ssm.A_log"].global_shape == (8,)
    assert local["layers.0.mixer.out_proj.weight"] == (256, 128)


@pytest.fixture
def hybrid_tiny():
    from megatron_lite.training.config import compose_run

    return compose_run(["model=nano2_tiny"]).model


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["model=nano2_tiny", "parallel.tp=4"],
            r"model\.attention\.kv_heads=2 .*parallel\.tp=4|model\.mamba\.groups=2 .*parallel\.tp=4",
        ),
        (["model=nano2_tiny", "seq_len=0"], "seq_len=0"),
        (["plot=x.png"], r"plot=x\.png .*gpus="),
        (["plot=x.png", "gpus=2", "gpu=h100", "search=true"], r"plot=x\.png .*no search"),
        (["model=nano2_tiny", "model.pattern=MG"], r"model\.pattern='MG' has 'G'"),
    ],
)
def test_what_cannot_be_is_refused(words, says):
    with pytest.raises(ValueError, match=says):
        command("plan", *words)


TINY = [
    "model=nemotron4_tiny",
    "precision=bf16",
    "data.seq_len=64",
    "train.max_steps=100",
    "train.global_batch_size=16",
]


def test_what_a_training_costs(capsys):
    assert command("plan", *TINY, "gpus=2", "gpu=h100", "price=3", "json=true") == 0
    printed = capsys.readouterr().out
    row = json.loads(printed.splitlines()[-1])
    assert sum(row["step_parts"].values()) == pytest.approx(row["step_seconds"])
    assert row["tokens_per_second"] == pytest.approx(16 * 64 / row["step_seconds"])
    bill = row["run"]
    assert bill["tokens"] == 100 * 16 * 64
    assert bill["gpu_hours"] == pytest.approx(2 * 100 * row["step_seconds"] / 3600)
    assert bill["cost"] == pytest.approx(3 * bill["gpu_hours"])
    assert row["measured"] is False
    assert "none of these numbers was measured" in printed
    for name in row["assumptions"]:
        assert name in printed


def test_a_run_that_goes_on_from_another_one_is_planned_without_it(capsys):
    words = [
        "experiment=hymba_1p5b_8k",
        "model=hymba_tiny",
        "model.max_seq_len=64",
        "data.seq_len=64",
        "train.global_batch_size=2",
    ]
    assert command("plan", *words, "train.micro_batch_size=1", "gpus=2", "gpu=a100") == 0
    printed = capsys.readouterr().out
    assert "% of the bf16 peak" in printed
    row = next(line for line in printed.splitlines() if line.startswith("│ state-space scans") and "PyTorch" in line)
    assert "data.reset_attention" in row  # why it is not a kernel


def test_the_layouts_of_a_search(capsys):
    assert command("plan", *TINY, "gpus=2", "gpu=h100", "search=true", "show=2", "json=true") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["best"]) == 2
    assert found["best"][0]["step_seconds"] <= found["best"][1]["step_seconds"]
    assert "slower" in found["best"][1]["loses"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["gpus=8"], "gpu is not given"),
        (["gpu=h100"], "gpus is not given"),
        (["search=true"], "search=true .*gpus="),
        (["gpus=0", "gpu=h100"], "gpus=0"),
        (["gpus=2", "gpu=h1000"], "gpu=h1000 .*h100"),
        (["gpus=2", "gpu=h100", "price=-1"], "price=-1"),
        (["gpus=2", "gpu=h100", "teacher=llama_tiny"], "teacher=llama_tiny .*objective=distillation"),
        (
            ["gpus=2", "gpu=h100", "objective=distillation", "objective.teacher=nowhere"],
            "nowhere does not exist.*teacher=",
        ),
        (["gpus=2", "gpu=h100", "seq_len=64"], r"data\.seq_len=64"),
        (["gpus=3", "gpu=h100"], "global batch of 16 .*24 would do"),
        (["gpus=2", "gpu=h100", "parallel.tp=3"], r"parallel\.tp"),
        (["gpus=2", "gpu=a100", "precision=fp8_current"], "gpu=a100 .*fp8"),
    ],
)
def test_what_cannot_be_planned_is_refused(words, says):
    with pytest.raises(ValueError, match=says):
        command("plan", *TINY, *words)
