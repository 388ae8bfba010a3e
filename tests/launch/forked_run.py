"""The tiny run on several ranks of this machine without a launcher: forks (`tests.forked`), which train after a second."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests import runs
from tests.forked import PROCESSES
from tests.launch.local_run import SLOWED
from tests.launch.slurm_cluster import free_ports

GRACE_SECONDS = 5.0  # for the other ranks, once one has failed


def train(data: Path, run_dir: Path, *overrides: str, ranks: int = 2, **settings: str) -> list[int]:
    """The ranks' exit codes; their output is in <run_dir>.log. What is left when one has failed is killed, as torchrun does.

    settings: environment variables, among them those of `slowed/sitecustomize.py`.
    """
    words = runs.arguments(data, run_dir, "train.micro_batch_size=1", *overrides)
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), **settings}
    processes: list[Any] = [
        PROCESSES.Process(target=_rank, args=(shared | {"RANK": str(rank)}, words, f"{run_dir}.log"), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            time.sleep(GRACE_SECONDS)
            break
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _rank(environment: dict[str, str], words: list[str], log: str) -> None:
    """`mlite train` in a fork."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= environment
    if environment.get("SLOW_RANK", environment["RANK"]) == environment["RANK"]:
        spec = importlib.util.spec_from_file_location("slowed", SLOWED / "sitecustomize.py")
        assert spec is not None
        assert spec.loader is not None
        slowed = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(slowed)
        slowed.apply(environment)
    from megatron_lite.commands import train

    sys.argv = ["train", *words]
    with runs.undrawn():
        train.main()
