"""Run a function on several processes from a test: on the CPU with gloo, or with MLITE_TEST_DEVICE=cuda on a GPU each with NCCL.

    from tests.distributed import run_ranks

    def sums(rank, world_size, value): ...          # top level of the test's file
    def test_sums():
        results = run_ranks(2, sums, 3.0)           # one result a rank

Notable features:
- One pool of workers for each world size, started at its first use and kept until pytest ends: a job then costs
  milliseconds. Workers are forks of a server that has imported torch (`tests.forked`). Each pytest-xdist worker has its own.
- Rendezvous through a file in a temporary folder: no port to collide on.
- `device()` is the device of this process, the one place that decides it; tests that need more GPUs than there are skip themselves.
- A rank's exception arrives in the test with its rank and traceback. A rank that hangs is named after the timeout, with
  where its Python stands; the pool is then killed and the next job starts a fresh one.

The function is found again by file and name, so it must stand at the top level of a file. Arguments and results are pickled:
plain values, tensors, and objects of importable modules (of megatron_lite, not of a test file).
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import importlib.util
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.forked import PROCESSES

# How long a worker may take to start, and a job: only what hangs takes that long, also on a machine that does five things at once.
PATIENCE_SECONDS = 600.0
GRACE_SECONDS = 3.0  # for the other ranks to fail too, once one has: their tracebacks often say why


def device_type() -> str:
    """Where tests run that can run anywhere: cpu or cuda."""
    return os.environ.get("MLITE_TEST_DEVICE", "cpu")


def device() -> Any:
    """The `torch.device` of this process: of a worker, or of the test itself."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if device_type() == "cuda" else torch.device("cpu")


class RanksFailed(AssertionError):
    """One or more ranks raised, died or did not answer in time; the message says which, with tracebacks."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = PATIENCE_SECONDS
) -> list[Any]:
    """`function(rank, world_size, *args)` on `world_size` processes in one group: the results, in order of rank.

    Raises RanksFailed when a rank raises, dies, or has not answered after `timeout` seconds.
    """
    if device_type() == "cuda":
        _skip_without_gpus(world_size)
    pool = _pool(world_size)
    pool.start()
    return pool.run((function.__code__.co_filename, function.__qualname__, args), timeout)


def _skip_without_gpus(number: int) -> None:
    import pytest
    import torch

    if torch.cuda.device_count() < number:
        pytest.skip(f"needs {number} GPUs, this machine has {torch.cuda.device_count()}")


@functools.cache
def _pool(world_size: int) -> _Pool:
    pool = _Pool(world_size)
    atexit.register(pool.stop)
    return pool


class _Pool:
    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self.pipes: list[Connection] = []
        self.folder = Path()

    def start(self) -> None:
        if self.processes and all(process.is_alive() for process in self.processes):
            return
        self.stop()
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        for rank in range(self.world_size):
            here, there = PROCESSES.Pipe()
            process = PROCESSES.Process(
                target=_serve, args=(rank, self.world_size, str(self.folder), there), daemon=True
            )
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)
        for rank, pipe in enumerate(self.pipes):  # the first imports take seconds, which no job's timeout should count
            if not pipe.poll(PATIENCE_SECONDS) or not self._receive(rank)[0]:
                self.stop()
                raise RanksFailed(f"rank {rank} of {self.world_size} did not start within {PATIENCE_SECONDS:g} s")

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self.pipes):
            process.join()
            pipe.close()
        if self.processes:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.processes, self.pipes = [], []

    def run(self, job: tuple[str, str, tuple[Any, ...]], timeout: float) -> list[Any]:
        message = pickle.dumps(job)
        for pipe in self.pipes:
            pipe.send_bytes(message)
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < self.world_size:
            open_pipes = {
                pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in results and rank not in failures
            }
            ready = wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = open_pipes[pipe]  # type: ignore[index]
                worked, value = self._receive(rank)
                (results if worked else failures)[rank] = value
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if len(results) == self.world_size:
            return [results[rank] for rank in range(self.world_size)]
        for rank in set(range(self.world_size)) - set(results) - set(failures):
            failures[rank] = f"no answer after {timeout:g} s, or {GRACE_SECONDS:g} s after another rank failed\n"
            failures[rank] += self._where(rank)
        self.stop()
        texts = [f"--- rank {rank} of {self.world_size}: {failures[rank]}" for rank in sorted(failures)]
        raise RanksFailed(f"{job[1]} on {self.world_size} ranks\n" + "\n".join(texts))

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return pickle.loads(self.pipes[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            process = self.processes[rank]
            process.join(1.0)
            return False, f"the process died (exit code {process.exitcode})\n{self._stack(rank)}"

    def _where(self, rank: int) -> str:
        """The stack of a rank that hangs, which `faulthandler` writes when it gets SIGABRT."""
        process = self.processes[rank]
        if process.pid is None or not hasattr(os, "kill") or sys.platform == "win32":
            return ""
        os.kill(process.pid, 6)  # SIGABRT
        process.join(2.0)
        return self._stack(rank)

    def _stack(self, rank: int) -> str:
        path = self.folder / f"stack-{rank}.txt"
        return path.read_text() if path.exists() else ""


def _serve(rank: int, world_size: int, folder: str, pipe: Connection) -> None:
    """A worker's life: join the group, then run jobs until the pipe closes."""
    import torch
    import torch.distributed as dist

    with open(Path(folder, f"stack-{rank}.txt"), "w") as stack:
        faulthandler.enable(stack)
        torch.set_num_threads(1)
        if device_type() == "cuda":
            torch.cuda.set_device(rank)
        _share_one_device()
        dist.init_process_group(
            "cuda:nccl,cpu:gloo" if device_type() == "cuda" else "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=PATIENCE_SECONDS),
        )
        pipe.send_bytes(pickle.dumps((True, "ready")))
        while True:
            try:
                filename, name, args = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                return
            try:
                function = getattr(_load(filename), name)
                answer = pickle.dumps((True, function(rank, world_size, *args)))
            except Exception:
                answer = pickle.dumps((False, traceback.format_exc()))
            pipe.send_bytes(answer)


def _share_one_device() -> None:
    """Let all gloo groups of this process speak through one device.

    Each would get its own, whose thread wakes a hundred times a second, and a thousand jobs leave hundreds of groups.
    """
    from torch.distributed import distributed_c10d

    gloo = distributed_c10d.ProcessGroupGloo
    device = gloo.create_default_device()

    class AnyGloo(type):
        def __instancecheck__(cls, group: object) -> bool:
            return isinstance(group, gloo)

    class OnOneDevice(metaclass=AnyGloo):
        def __new__(cls, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
            options = gloo._Options()
            options._devices, options._timeout = [device], timeout
            return gloo(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = OnOneDevice


@functools.cache
def _load(filename: str) -> ModuleType:
    """The test's file as a module; cached, since the workers outlive many jobs."""
    spec = importlib.util.spec_from_file_location(Path(filename).stem, filename)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(Path(filename).stem, module)
    spec.loader.exec_module(module)
    return module
