"""`mlite plan`: sizes and shapes of full-size models, without memory."""

from __future__ import annotations

import pytest

from megatron_lite.commands.plan import shapes
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
    infos, local = shapes(hybrid_tiny, tp=2)
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
        (["model=nano2_tiny", "model.pattern=MG"], r"model\.pattern='MG' has 'G'"),
    ],
)
def test_what_cannot_be_is_refused(words, says):
    with pytest.raises(ValueError, match=says):
        command("plan", *words)
