"""The benchmark of a training step, at its smallest: real processes that take turns, and what the table makes of their seconds."""

from __future__ import annotations

import pytest

from benchmarks import train_step
from benchmarks.train_step import Result


def test_a_ratio_is_of_neighboring_turns_and_above_one_where_ours_is_faster():
    ours, peer = [1.0, 2.0, 4.0, 1.0, 1.0], [2.0, 2.0, 12.0, 1.5, 0.5]  # ratios 2, 1, 3, 1.5, 0.5
    row = Result(ours, peer, first=(9.0, 8.0), torch="2").row("x", tokens=100)
    assert row == ["x", "1.500", "1.000", "100", "50", "9.0 / 8.0", "2"]


@pytest.mark.slow
def test_processes_take_turns_and_what_cannot_run_is_named(tmp_path, capsys):
    options = ["--model", "tiny", "--pairs", "2", "--steps", "1", "--threads", "1", "--environment", str(tmp_path)]
    train_step.main([*options, "--peers", "eager", "megatron-core"])
    printed = capsys.readouterr().out
    (row,) = (line for line in printed.splitlines() if line.startswith("| eager"))
    assert all(float(cell.replace(",", "")) > 0 for cell in row.split("|")[2:6])
    assert f"megatron-core is left out: there is no {tmp_path}" in printed
    with pytest.raises(SystemExit):
        train_step.main([*options, "--peers", "eager", "--pairs", "1"])


def test_a_peer_that_fails_says_why(monkeypatch, capsys):
    monkeypatch.setitem(train_step.PEERS, "eager", train_step.Peer("not_there"))
    with pytest.raises(SystemExit):  # nothing was measured
        train_step.main(["--model", "tiny", "--peers", "eager"])
    printed = capsys.readouterr().out
    assert "eager is left out: not_there ended: " in printed
    assert "No module named benchmarks.peers.not_there" in printed
