"""Processes for tests: forks of a server that has only imported things, so that they start in milliseconds and not in seconds.

    from tests.forked import PROCESSES

    process = PROCESSES.Process(target=function, args=(...), daemon=True)

One server for each process of pytest, started at its first use; it keeps the environment of that moment. A fork has one thread and
has computed nothing, like a process that was just started. But all forks order sets of strings alike, which ranks that torchrun
starts do not: the jobs of tests/launch are such ranks. A GPU's driver may not survive a fork, so with MLITE_TEST_DEVICE=cuda Python
is started anew for each process.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import BaseContext


def _context() -> BaseContext:
    if os.environ.get("MLITE_TEST_DEVICE") == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.forked_imports"])
    return context


PROCESSES = _context()
