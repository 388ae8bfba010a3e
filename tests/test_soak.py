"""The short form of `make soak`, and that the soak would notice what it is there to notice."""

from __future__ import annotations

import json

import pytest

from tests.soak import EVERY, Soak, last_step, newest_whole


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_the_same_run(tiny_data, tmp_path):
    summary = Soak(tmp_path, data=tiny_data, seed=3, say=lambda text: None).run(kills=4)
    assert summary.kills == 4
    assert summary.in_a_save >= 1
    assert "bitwise equal" in summary.text()


@pytest.fixture
def soak(tiny_data, straight, copy_of, tmp_path):
    """A soak whose killed run is a copy of an undisturbed one of 20 steps with checkpoints of steps 12, 16 and 20."""
    soak = Soak(tmp_path, data=tiny_data, seed=0)
    soak.straight, soak.run_dir = straight, copy_of(straight)
    return soak


def test_it_notices_another_digit(soak):
    metrics = soak.run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[7]["loss"] *= 1 + 2**-52
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(AssertionError, match="losses"):
        soak._check_round()


def test_it_notices_a_lost_checkpoint_and_lost_steps(soak):
    assert newest_whole(soak.run_dir) == last_step(soak.run_dir) == 20
    victim = soak.run_dir / "checkpoints" / "step_00000020"
    max(victim.glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(AssertionError, match="step 20 was whole before the kill, the newest one now is 16"):
        soak._check_kill(20, may_lose=EVERY)
    with pytest.raises(AssertionError, match="a kill at step 20 goes back to 16"):
        soak._check_kill(16, may_lose=EVERY)
    soak._check_kill(16, may_lose=4)


def test_a_job_that_ends_by_itself_is_no_kill(soak):
    (soak.run_dir / "checkpoints").rename(soak.run_dir / "elsewhere")
    (soak.run_dir / "checkpoints").write_text("no directory")
    with pytest.raises(AssertionError, match=r"ended with [12]"):
        soak._finish(soak.run_dir, [], slowness=0.0)


def test_rows_of_a_torn_file_are_counted(tmp_path, straight):
    text = (straight / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text[: text.index('"step": 9') + 20])
    assert last_step(tmp_path) == 8
