"""The real slurm.sbatch on a real Slurm: two nodes train, are preempted, lose a node, and lose nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.commands.launch import scripts_dir
from tests import runs
from tests.launch.slurm_cluster import SlurmCluster, wait_for

pytestmark = pytest.mark.slow
SLOWED = Path(__file__).parent / "slowed"
PROJECT = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Job:
    """One submission of the tiny run on two nodes with one rank each."""

    def __init__(self, cluster: SlurmCluster, data: Path, run_dir: Path, *overrides: str, **settings: str) -> None:
        self.cluster, self.run_dir = cluster, run_dir
        environment = {
            **cluster.environment, "NODES": "2", "GPUS_PER_NODE": "0", "RANKS_PER_NODE": "1", "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{SLOWED}:{PROJECT}", "TIME": "10", "SIGNAL_SECONDS": "60", **settings,
        }  # fmt: skip
        words = runs.arguments(data, run_dir, "train.micro_batch_size=1", *overrides)
        done = subprocess.run(
            ["bash", str(scripts_dir() / "slurm.sh"), *words],
            env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.number = done.stdout.strip()

    @property
    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.number)["Restarts"])

    def story(self) -> str:
        """What there is to read when something went wrong."""
        files = [*(self.run_dir / "logs").glob("*"), self.run_dir / "attempts.log", self.run_dir / "status.json"]
        return str(self.cluster.job(self.number)) + "".join(
            f"\n== {f}\n{f.read_text(errors='replace')[-6000:]}" for f in files if f.exists()
        )

    def output(self) -> str:
        (log,) = (self.run_dir / "logs").glob(f"*-{self.number}.out")
        return log.read_text(errors="replace")

    def wait(self, seconds: float = 900) -> str:
        wait_for(lambda: self.state in ENDED, seconds=seconds, what=self.story)
        return self.state

    def wait_for_step(self, step: int) -> None:
        def there() -> bool:
            return (self.run_dir / "metrics.jsonl").exists() and len(runs.rows(self.run_dir)) >= step

        wait_for(there, seconds=600, what=self.story)


@pytest.fixture(scope="module")
def uninterrupted(slurm: SlurmCluster, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-node run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("slurm") / "whole"
    job = Job(slurm, tiny_data, directory)
    assert job.wait() == "COMPLETED", job.story()
    return directory


def test_two_nodes_train(uninterrupted, straight):
    assert runs.status(uninterrupted)["state"] == "finished"
    ours, one_process = runs.curve(uninterrupted), runs.curve(straight)
    assert len(ours) == 20
    # Two ranks add in another order than one: 1e-7 a step in fp32, which 20 steps at a rate of 1e-2 let grow.
    for row, expected in zip(ours[:4], one_process[:4]):
        assert row == pytest.approx(expected, rel=1e-5)
    for row, expected in zip(ours, one_process):
        assert row[:3] == pytest.approx(expected[:3], rel=1e-4)


def test_check_runs_on_the_nodes_and_is_not_requeued(slurm, tiny_data, tmp_path):
    job = Job(slurm, tiny_data, tmp_path / "checked", "check=true")
    assert job.wait() in ("COMPLETED", "FAILED"), job.story()  # a busy machine may make one of the two slow
    assert "2 node(s), 2 rank(s)" in job.output(), job.story()
    assert job.restarts == 0
    assert not (tmp_path / "checked" / "attempts.log").exists()


def test_preempted_by_the_time_limit(slurm, tiny_data, tmp_path, uninterrupted):
    """The save takes longer than the 30 s that torchrun grants by default, and the run ends with the same numbers."""
    run = tmp_path / "preempted"
    # The signal comes 60 to 120 s before the limit of three minutes; 20 steps of 10 s do not end before that.
    job = Job(
        slurm, tiny_data, run, "checkpoint.every=0", TIME="3", SIGNAL_SECONDS="60", SLOW_STEP="10", SLOW_SAVE="32"
    )
    assert job.wait(seconds=900) == "COMPLETED", job.story()
    assert job.restarts == 1, job.story()
    attempts = [line.split("\t") for line in (run / "attempts.log").read_text().splitlines()]
    assert [line[2] for line in attempts] == ["preempted", "finished"], job.story()
    assert attempts[0][3].startswith("step_"), "the slow save was cut off"
    assert runs.curve(run) == runs.curve(uninterrupted)


def test_the_first_node_is_lost(slurm, tiny_data, tmp_path, uninterrupted):
    """The batch script and the rendezvous die with it: then Slurm requeues the job by itself."""
    run = tmp_path / "lost"
    job = Job(slurm, tiny_data, run, SLOW_STEP="1")
    job.wait_for_step(10)
    slurm.kill_node("node1")
    wait_for(lambda: job.restarts == 1 or job.state in ENDED, seconds=600, what=job.story)
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
    wait_for(lambda: job.restarts == 1 or job.state in ENDED, seconds=600, what=job.story)
    slurm.start_node("node2")
    assert job.wait() == "COMPLETED", job.story()
    assert f"resuming from {first}: step 4" in job.output()
    assert runs.curve(run) == runs.curve(uninterrupted)


def test_a_wrong_config_is_not_requeued(slurm, tiny_data, tmp_path):
    """One that only the ranks can find, because it takes the nodes' files."""
    job = Job(slurm, tiny_data, tmp_path / "wrong", "data.tokenizer=/nowhere")
    assert job.wait() == "FAILED"
    assert job.restarts == 0
    assert "/nowhere" in job.output()


def test_a_cancelled_job_stays_cancelled(slurm, tiny_data, tmp_path):
    """scancel's SIGTERM is like a preemption's: the ranks save; but nobody wants the job to come back."""
    job = Job(slurm, tiny_data, tmp_path / "cancelled", "train.max_steps=2000", SLOW_STEP="0.2")
    job.wait_for_step(2)
    slurm.command("scancel", job.number)
    assert job.wait() == "CANCELLED", job.story()
    wait_for(slurm.idle, seconds=600, what=job.story)  # the batch script has ended
    assert (job.state, job.restarts) == ("CANCELLED", 0), job.story()


def test_the_controller_is_away_when_the_job_asks_for_a_requeue(slurm, tiny_data, tmp_path, uninterrupted):
    run = tmp_path / "away"
    job = Job(slurm, tiny_data, run, SLOW_STEP="1")
    job.wait_for_step(4)
    slurm.command("scancel", "--signal=USR1", job.number)
    slurm.stop_controller()
    try:
        wait_for(lambda: ": requeue (" in job.output(), seconds=600, what=lambda: job.output())
    finally:
        slurm.start_controller()
    assert job.wait() == "COMPLETED", job.story()
    assert job.restarts == 1
    assert runs.curve(run) == runs.curve(uninterrupted)


def test_two_jobs_on_one_run_directory(slurm, tiny_data, tmp_path, uninterrupted):
    """The second one is refused and leaves the first alone."""
    run = tmp_path / "both"
    first = Job(slurm, tiny_data, run, SLOW_STEP="1", NODES="1", RANKS_PER_NODE="2")
    first.wait_for_step(2)
    second = Job(slurm, tiny_data, run, NODES="1", RANKS_PER_NODE="2")
    assert second.wait() == "FAILED", second.story()
    assert second.restarts == 0
    assert "is in use by" in second.output()
    assert first.wait() == "COMPLETED", first.story()
    assert runs.curve(run) == runs.curve(uninterrupted)


def test_chained_by_stop_at(slurm, tiny_data, tmp_path, uninterrupted):
    """stop_at ends a job for good; the next one, submitted to follow it, finishes the run."""
    run = tmp_path / "chained"
    first = Job(slurm, tiny_data, run, "train.stop_at=8")
    second = Job(slurm, tiny_data, run, DEPENDENCY=f"afterok:{first.number}")
    assert second.wait() == "COMPLETED", second.story()
    assert (first.state, first.restarts) == ("COMPLETED", 0)
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
        wait_for(slurm.idle, seconds=600, what=slurm.logs)
    assert job.restarts == 0
    checkpoints = run / "checkpoints"
    ranks = [
        json.loads((checkpoints / f"step_000000{n}" / "manifest.json").read_text())["world_size"] for n in ("08", "20")
    ]
    assert ranks == [2, 1]
    rows, expected = runs.curve(run), runs.curve(straight)
    assert [row[:2] for row in rows] == [row[:2] for row in expected]
    assert [row[2] for row in rows] == pytest.approx([row[2] for row in expected], rel=1e-4)
