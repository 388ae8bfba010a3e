"""A real Slurm loses nodes, and the run loses nothing. A file of its own, to run beside the other tests of Slurm."""

from __future__ import annotations

import json
import re

import pytest

from tests import runs
from tests.launch.slurm_cluster import wait_for
from tests.launch.slurm_job import Job

pytestmark = pytest.mark.slow


def test_the_first_node_is_lost(slurm, tiny_data, tmp_path, uninterrupted):
    """The batch script and the rendezvous die with it: then Slurm requeues the job by itself."""
    run = tmp_path / "lost"
    job = Job(slurm, tiny_data, run, SLOW_STEP="1")
    job.wait_for_step(6)
    slurm.kill_node("node1")
    job.wait_for_restart()
    slurm.start_node("node1")
    assert job.wait() == "COMPLETED", job.story()
    assert job.restarts >= 1  # Slurm requeues it once more when a node that has just come back answers late
    assert runs.curve(run) == runs.curve(uninterrupted)


def test_a_node_lost_during_a_save(slurm, tiny_data, tmp_path, uninterrupted):
    """Only that save is lost: the run goes on from the checkpoint before it."""
    run = tmp_path / "torn"
    job = Job(slurm, tiny_data, run, SLOW_SAVE="6")
    first, second = run / "checkpoints" / "step_00000004", run / "checkpoints" / ".tmp-step_00000008"
    wait_for(second.exists, seconds=600, what=job.story)
    slurm.kill_node("node2")
    job.wait_for_restart()
    slurm.start_node("node2")
    assert job.wait() == "COMPLETED", job.story()
    assert f"resuming from {first}: step 4" in job.output()
    assert runs.curve(run) == runs.curve(uninterrupted)


def test_goes_on_without_a_node(slurm, tiny_data, tmp_path, straight):
    """With MIN_NODES=1 the job is not requeued: torchrun restarts the ranks on the node that is left."""
    run = tmp_path / "smaller"
    job = Job(slurm, tiny_data, run, "checkpoint.keep=9", MIN_NODES="1", SLOW_STEP="1")
    job.wait_for_step(10)
    slurm.kill_node("node2")
    try:
        assert job.wait(seconds=900) == "COMPLETED", job.story()
    finally:
        slurm.start_node("node2")
        wait_for(slurm.idle, seconds=600, what=slurm.logs, every=1.0)
    assert job.restarts == 0
    assert re.search(
        r"^ *0: resuming from .*step_000000\d\d: step", job.output(), re.MULTILINE
    )  # rank 0 is on the first node
    checkpoints = run / "checkpoints"
    ranks = [
        json.loads((checkpoints / f"step_000000{n}" / "manifest.json").read_text())["world_size"] for n in ("08", "20")
    ]
    assert ranks == [2, 1]
    rows, expected = runs.curve(run), runs.curve(straight)
    assert [row[:2] for row in rows] == [row[:2] for row in expected]
    assert [row[2] for row in rows] == pytest.approx([row[2] for row in expected], rel=1e-4)
