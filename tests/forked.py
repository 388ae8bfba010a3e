"""Processes for tests: forks of a server that has only imported things, so that they start in milliseconds and not in seconds.

    from tests.forked import PROCESSES

    process = PROCESSES.Process(target=function, args=(...), daemon=True)

One server for each process of pytest, started at its first use; it keeps the environment of that moment. A fork has one thread and
has computed nothing, like a process that was just started. But all forks order sets of strings alike, which ranks that torchrun
starts do not: the jobs of tests/launch are such ranks.
"""

from __future__ import annotations

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.forked_imports"])
