"""The tiny run through launch/local.sh, as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from megatron_lite.commands.launch import scripts_dir
from tests import runs
from tests.launch.slurm_cluster import wait_for

SLOWED = Path(__file__).parent / "slowed"
PROJECT = Path(__file__).parents[2]


def environment(**settings: str) -> dict[str, str]:
    """This process's environment with the settings, able to import the project and the slowed ranks."""
    fixed = {
        "PYTHON": sys.executable, "PYTHONPATH": f"{SLOWED}:{PROJECT}", "OMP_NUM_THREADS": "1", "SAVE_SECONDS": "1", "UNDRAWN": "1",
    }  # fmt: skip
    return {**os.environ, **fixed, **settings}


def start(data: Path, run_dir: Path, *overrides: str, **settings: str) -> subprocess.Popen[str]:
    """local.sh with these settings, in a session of its own; its output goes to <run_dir>.log, to be read with `output`."""
    words = runs.arguments(data, run_dir, "train.micro_batch_size=1", *overrides)
    with Path(f"{run_dir}.log").open("a") as log:
        return subprocess.Popen(
            ["bash", str(scripts_dir() / "local.sh"), *words],
            env=environment(**settings), stdout=log, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip


def finish(process: subprocess.Popen[str], seconds: float = 900) -> int:
    """Its exit code; whatever is left of its session is killed, and a run that does not end is an error."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def wait_until_it_trains(run_dir: Path, *, steps: int = 3, log: Path | None = None) -> None:
    """Until that many steps are done; `log` is shown if they never are."""
    rows = run_dir / "metrics.jsonl"
    log = log or Path(f"{run_dir}.log")
    wait_for(lambda: rows.exists() and len(runs.rows(run_dir)) >= steps, seconds=600, what=log.read_text)


def output(run_dir: Path) -> str:
    return Path(f"{run_dir}.log").read_text(errors="replace")


def below(process: int) -> list[int]:
    """All descendants of a process."""
    children = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True, check=False).stdout.split()
    return [found for child in map(int, children) for found in (child, *below(child))]
