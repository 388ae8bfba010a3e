"""`make fp8` at its smallest: every arm, column and file is there; and the verdicts on intervals that are known."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import fp8
from benchmarks.summary import Interval
from tests import runs


@pytest.mark.slow
def test_the_demo_has_every_arm_column_and_file(tiny_data, tmp_path, capsys):
    words = [word for word in runs.TINY if not word.startswith(("train.threads=", "tracking=", "train.max_steps="))]
    model = [
        "model=nano2_tiny",
        "model.pattern=M-*-",
        "model.hidden_size=32",
        "model.mamba.heads=4",
        "model.mamba.head_dim=16",
    ]
    words = [word for word in words if not word.startswith(("model=", "model.num_layers="))]
    options = ["--size", "tiny", "--folder", str(tmp_path)]
    fp8.main(
        [
            *options,
            "--",
            "--config-dir",
            str(tiny_data),
            *model,
            *words,
            "train.max_tokens=1024",
            "schedule.warmup_steps=1",
        ]
    )
    found = json.loads((tmp_path / "fp8.json").read_text())
    assert list(found["losses"]) == ["fp32", "bf16", "current", "block", "all_e5m2", "underflow"]
    assert all(len(losses) == 1 and math.isfinite(losses[0]) for losses in found["losses"].values())
    assert len({losses[0] for losses in found["losses"].values()}) == 6  # every arm computes in another way
    assert found["gaps"]["block"]["bf16"][0] == pytest.approx(
        found["losses"]["block"][0] / found["losses"]["bf16"][0] - 1
    )
    table = [line for line in (tmp_path / "fp8.md").read_text().split("\n") if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == list(found["losses"])
    assert {line.count("|") for line in table} == {6}
    assert table[-1].endswith("| cannot tell |")  # one seed has no interval
    assert (tmp_path / "fp8.png").stat().st_size > 10_000
    assert "processor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gap", "verdict"),
    [
        (Interval(0.001, 0.001), "under"), (Interval(-0.01, 0.002), "under"), (Interval(0.001, 0.002), "cannot tell"),
        (Interval(-0.01, 0.005), "cannot tell"), (Interval(0.001, math.inf), "cannot tell"), (Interval(0.01, 0.005), "above"),
        (Interval(math.nan, math.inf), "above"),
    ],
)  # fmt: skip
def test_a_verdict_needs_the_whole_interval(gap, verdict):
    assert fp8.verdict(gap) == verdict
