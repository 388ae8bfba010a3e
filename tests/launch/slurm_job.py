"""A tiny run as a job of two nodes with one rank each, submitted by slurm.sh."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megatron_lite.commands.launch import scripts_dir
from tests import runs
from tests.launch.slurm_cluster import SlurmCluster, free_ports, wait_for

SLOWED = Path(__file__).parent / "slowed"
PROJECT = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Job:
    """One submission of the tiny run on two nodes with one rank each."""

    def __init__(self, cluster: SlurmCluster, data: Path, run_dir: Path, *overrides: str, **settings: str) -> None:
        self.cluster, self.run_dir = cluster, run_dir
        environment = {
            **cluster.environment, "NODES": "2", "GPUS_PER_NODE": "0", "RANKS_PER_NODE": "1", "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1", "UNDRAWN": "1", "PYTHONPATH": f"{SLOWED}:{PROJECT}", "TIME": "10", "SIGNAL_SECONDS": "60",
            "MASTER_PORT": str(free_ports(1)[0]), **settings,  # its default, the job's number, is the same in two clusters
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

    def limit_to(self, seconds: int) -> None:
        """Let Slurm's time limit, which is whole minutes, come in `seconds` or up to a minute later."""
        hours, minutes, ran = map(int, self.cluster.job(self.number)["RunTime"].split(":"))
        limit = (3600 * hours + 60 * minutes + ran + seconds) // 60 + 1
        self.cluster.command("scontrol", "update", f"JobId={self.number}", f"TimeLimit={limit}")

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
        wait_for(lambda: self.state in ENDED, seconds=seconds, what=self.story, every=1.0)
        return self.state

    def wait_for_restart(self) -> None:
        """Until Slurm has requeued it, or it has ended."""

        def there() -> bool:
            job = self.cluster.job(self.number)
            return job["Restarts"] == "1" or job["JobState"] in ENDED

        wait_for(there, seconds=600, what=self.story, every=1.0)

    def wait_for_step(self, step: int) -> None:
        def there() -> bool:
            return (self.run_dir / "metrics.jsonl").exists() and len(runs.rows(self.run_dir)) >= step

        wait_for(there, seconds=600, what=self.story)
