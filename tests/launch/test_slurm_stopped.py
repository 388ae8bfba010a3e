"""A real Slurm stops a job: by its time limit, by scancel, and when the controller is away. A file of its own, as `test_slurm_lost.py`."""

from __future__ import annotations

import pytest

from tests import runs
from tests.launch.slurm_cluster import wait_for
from tests.launch.slurm_job import Job

pytestmark = pytest.mark.slow


def test_preempted_by_the_time_limit(slurm, tiny_data, tmp_path, uninterrupted):
    """The save takes longer than torchrun would grant by itself (3 s here, 30 s by default), and the run ends with the same numbers."""
    run = tmp_path / "preempted"
    alone = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}  # what the job's own setting must replace
    job = Job(slurm, tiny_data, run, "checkpoint.every=0", SIGNAL_SECONDS="60", SLOW_STEP="6", SLOW_SAVE="8", **alone)
    job.wait_for_step(2)
    job.limit_to(70)  # Slurm looks every 30 s, and then sends the signal up to 30 s early; twenty steps take longer
    assert job.wait(seconds=900) == "COMPLETED", job.story()
    assert job.restarts == 1, job.story()
    attempts = [line.split("\t") for line in (run / "attempts.log").read_text().splitlines()]
    assert [line[2] for line in attempts] == ["preempted", "finished"], job.story()
    assert attempts[0][3].startswith("step_"), "the slow save was cut off"
    assert runs.curve(run) == runs.curve(uninterrupted)


def test_a_cancelled_job_stays_cancelled(slurm, tiny_data, tmp_path):
    """scancel's SIGTERM is like a preemption's: the ranks save; but nobody wants the job to come back."""
    job = Job(slurm, tiny_data, tmp_path / "cancelled", "train.max_steps=2000", SLOW_STEP="0.2")
    job.wait_for_step(2)
    slurm.command("scancel", job.number)
    assert job.wait() == "CANCELLED", job.story()
    wait_for(slurm.idle, seconds=600, what=job.story, every=1.0)  # the batch script has ended
    assert (job.state, job.restarts) == ("CANCELLED", 0), job.story()


def test_the_controller_is_away_when_the_job_asks_for_a_requeue(slurm, tiny_data, tmp_path, uninterrupted):
    run = tmp_path / "away"
    job = Job(slurm, tiny_data, run, SLOW_STEP="1")
    job.wait_for_step(4)
    slurm.command("scancel", "--signal=USR1", job.number)
    # a controller that ends at once may not have passed the signal on; the job asks for its requeue after a step and a save
    wait_for(lambda: "closing signal SIGUSR1" in job.output(), seconds=60, what=lambda: job.output())
    slurm.stop_controller()
    try:
        wait_for(lambda: ": requeue (" in job.output(), seconds=600, what=lambda: job.output())
    finally:
        slurm.start_controller()
    assert job.wait() == "COMPLETED", job.story()
    assert job.restarts == 1
    assert runs.curve(run) == runs.curve(uninterrupted)
