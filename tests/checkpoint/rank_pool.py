"""A pool of gloo ranks that lives through many calls, and the small checkpoints that the tests save."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# the server imports torch once; its forks start in milliseconds
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "megatron_lite.checkpoint"])

GROUPS: dict[int, dist.ProcessGroup | None] = {}  # in a rank: the first n ranks; made once, as groups are dear

STATE: dict[str, Any] = {
    "consumed_samples": 640,
    "adam_step": 10,
    "config": {"seed": 1234, "optim": {"lr": 3e-4}},
    "tokenizer": "sha256:0123",
    "schedule": {"name": "cosine"},
    "data": {"phases": [[0, 100]]},
    "rng": {},
}


class RankPool:
    """`run(function, *args)` calls `function(rank, *args)` on every rank and returns the results in order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        self.processes = []
        self.pipes: list[Connection] = []
        for rank in range(size):
            here, there = _CONTEXT.Pipe()
            process = _CONTEXT.Process(
                target=_serve, args=(rank, size, f"{self.folder.name}/store", there), daemon=True
            )
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        outcomes = self.outcomes(function, *args, timeout=timeout)
        for rank, (fine, value) in enumerate(outcomes):
            assert fine, f"rank {rank}:\n{value}"
        return [value for _, value in outcomes]

    def outcomes(self, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[tuple[bool, Any]]:
        """(True, result) or (False, traceback) of every rank; a rank that died gives (False, 'died')."""
        for pipe in self.pipes:
            pipe.send((function, args))
        found: list[tuple[bool, Any]] = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout):
                self.close()
                raise TimeoutError(f"rank {rank} of {function.__name__} has not answered in {timeout} s")
            try:
                found.append(pipe.recv())
            except EOFError:
                found.append((False, "died"))
        return found

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    for n in range(1, size + 1):
        GROUPS[n] = dist.new_group(list(range(n)), backend="gloo")
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send((True, function(rank, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def run_alone(function: Callable[..., None], *args: Any, timeout: float = 60) -> int:
    """Run `function(*args)` in a process of its own and return its exit code."""
    process = _CONTEXT.Process(target=_alone, args=(function, *args), daemon=True)
    process.start()
    process.join(timeout)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def start_alone(function: Callable[..., None], *args: Any) -> Any:
    """Start `function(*args)` in a process of its own."""
    process = _CONTEXT.Process(target=_alone, args=(function, *args), daemon=True)
    process.start()
    return process


def _alone(function: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)
    function(*args)


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    """A small state whose every number depends on the step."""
    generator = torch.Generator().manual_seed(step)
    draw = {"generator": generator}
    return {
        "model.embedding.weight": torch.randn(11, 6, **draw),
        "model.norm.weight": torch.randn(6, **draw).bfloat16(),
        "exp_avg.embedding.weight": torch.randn(11, 6, **draw),
        "exp_avg_sq.embedding.weight": torch.rand(11, 6, **draw),
        "model.scalar": torch.randn((), **draw),
    }


def empty_like(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors to load into; NaN shows what was not filled."""
    return {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}


def bitwise_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and as_bytes(left[name]).equal(as_bytes(right[name]))
        for name in left
    )


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def flip_byte(file: Path, place: int = -1) -> None:
    """Damage one byte without changing the size."""
    data = bytearray(file.read_bytes())
    data[place] ^= 0x40
    file.write_bytes(data)
