"""Runs in FP8: what stops and evaluates goes on as if nothing had happened, and a run may change its precision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lite.checkpoint.opening import describe
from megatron_lite.commands.evaluate import compose_evaluate, evaluate
from tests import runs
from tests.hf_folders import command

DELAYED = ["precision=fp8_delayed", "precision.amax_history_len=5", "checkpoint.every=3"]


def test_stops_and_evaluations_leave_the_bits_alone(tiny_data: Path, tmp_path: Path, capsys) -> None:
    """Delayed scaling, whose state is more than weights and moments; `mlite evaluate` finds it in the checkpoint."""
    words = [*DELAYED, "train.max_steps=6", "train.eval_every=0"]
    assert runs.run(tiny_data, tmp_path / "straight", *words) == 0
    printed = capsys.readouterr().out
    assert "fp8_delayed, emulated:" in printed
    assert "2 x Attention.qkv" in printed
    for stop in (3, 6):
        assert runs.run(tiny_data, tmp_path / "stopped", *words, f"train.stop_at={stop}", "train.eval_every=2") == 0
    assert runs.curve(tmp_path / "stopped") == runs.curve(tmp_path / "straight")
    one, other = (runs.digest(tmp_path / name / "checkpoints" / "step_00000006") for name in ("stopped", "straight"))
    assert one == other
    words = evaluating(tiny_data, tmp_path / "stopped")
    assert evaluated(capsys, *words) == logged(tmp_path / "stopped")
    assert evaluated(capsys, *words, "precision=bf16") != logged(tmp_path / "stopped")
    assert command("convert", f"source={tmp_path / 'stopped'}", f"target={tmp_path / 'weights'}", "to=native") == 0
    with pytest.raises(
        ValueError, match=r"precision=fp8_delayed.* no scale of layers\.0\.mixer\.qkv.*precision=fp8_current"
    ):
        evaluate(compose_evaluate(evaluating(tiny_data, tmp_path / "weights")))


def test_a_run_may_change_its_precision(tiny_data: Path, tmp_path: Path, capsys) -> None:
    kinds = {}
    for stop, words in ((1, ["precision=bf16"]), (2, DELAYED), (3, ["precision=fp8_current"])):
        assert runs.run(tiny_data, tmp_path / "r", *words, "train.max_steps=8", f"train.stop_at={stop}") == 0
        said = capsys.readouterr().out
        assert ("in the checkpoint" in said) == (stop > 1)
        assert ("start afresh" in said) == (words is DELAYED)
        newest = tmp_path / "r" / "checkpoints" / f"step_{stop:08d}"
        kinds[stop] = {name.split(".")[0] for name in describe(newest)}
    delayed = {"scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd"}
    assert [delayed <= kinds[stop] for stop in (1, 2, 3)] == [False, True, False]
    losses = [row["loss"] for row in runs.rows(tmp_path / "r")]
    assert losses == sorted(losses, reverse=True)  # no precision starts again


def test_evaluate_computes_as_the_run_did(tiny_data: Path, tmp_path: Path, capsys) -> None:
    assert runs.run(tiny_data, tmp_path / "r", "precision=fp8_block", "train.max_steps=2") == 0
    assert evaluated(capsys, *evaluating(tiny_data, tmp_path / "r")) == logged(tmp_path / "r")


def logged(run_dir: Path) -> dict[str, float]:
    """The losses of the last validation of a run."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row["val_loss"] for row in map(json.loads, lines) if "val_loss" in row][-1]


def evaluated(capsys, *words: str) -> dict[str, float]:
    """What `mlite evaluate` prints."""
    capsys.readouterr()
    assert evaluate(compose_evaluate(list(words))) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["val_loss"]


def evaluating(data: Path, run_dir: Path) -> list[str]:
    return ["--config-dir", str(data), f"checkpoint={run_dir}", "json=true"]
