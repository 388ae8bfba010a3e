"""The real slurm.sbatch on a real Slurm: two nodes train, are checked, refused and chained."""

from __future__ import annotations

import pytest

from tests import runs
from tests.launch.slurm_job import Job

pytestmark = pytest.mark.slow


def test_check_runs_on_the_nodes_and_is_not_requeued(slurm, tiny_data, tmp_path):
    job = Job(slurm, tiny_data, tmp_path / "checked", "check=true")
    assert job.wait() in ("COMPLETED", "FAILED"), job.story()  # a busy machine may make one of the two slow
    assert "2 node(s), 2 rank(s)" in job.output(), job.story()
    assert job.restarts == 0
    assert not (tmp_path / "checked" / "attempts.log").exists()


def test_a_wrong_config_is_not_requeued(slurm, tiny_data, tmp_path):
    """One that only the ranks can find, because it takes the nodes' files."""
    job = Job(slurm, tiny_data, tmp_path / "wrong", "data.tokenizer=/nowhere")
    assert job.wait() == "FAILED"
    assert job.restarts == 0
    assert "/nowhere" in job.output()


def test_two_jobs_on_one_run_directory(slurm, tiny_data, tmp_path, uninterrupted):
    """The second one is refused and leaves the first alone."""
    run = tmp_path / "both"
    go = tmp_path / "go"
    first = Job(slurm, tiny_data, run, HANG_STEP="3", HANG_UNTIL=str(go), NODES="1", RANKS_PER_NODE="2")
    first.wait_for_step(2)
    second = Job(slurm, tiny_data, run, NODES="1", RANKS_PER_NODE="2")
    assert second.wait() == "FAILED", second.story()
    assert second.restarts == 0
    assert "is in use by" in second.output()
    go.touch()
    assert first.wait() == "COMPLETED", first.story()
    assert runs.curve(run) == runs.curve(uninterrupted)


def test_two_nodes_train_and_stop_at_chains_jobs(slurm, tiny_data, tmp_path, uninterrupted, straight):
    """stop_at ends a job for good; the next one, submitted to follow it, finishes the run."""
    run = tmp_path / "chained"
    first = Job(slurm, tiny_data, run, "train.stop_at=8")
    second = Job(slurm, tiny_data, run, DEPENDENCY=f"afterok:{first.number}")
    assert second.wait() == "COMPLETED", second.story()
    assert (first.state, first.restarts) == ("COMPLETED", 0)
    assert runs.status(run)["state"] == "finished"
    assert runs.curve(run) == runs.curve(uninterrupted)
    ours, one_process = runs.curve(uninterrupted), runs.curve(straight)
    assert len(ours) == 20
    # Two ranks add in another order than one: 1e-7 a step in fp32, which 20 steps at a rate of 1e-2 let grow.
    for row, expected in zip(ours[:4], one_process[:4]):
        assert row == pytest.approx(expected, rel=1e-5)
    for row, expected in zip(ours, one_process):
        assert row[:3] == pytest.approx(expected[:3], rel=1e-4)
