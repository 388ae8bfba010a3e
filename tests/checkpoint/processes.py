"""Processes that the tests may kill, and the small checkpoints that they save."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed import PATIENCE_SECONDS
from tests.forked import PROCESSES

_GROUPS: dict[int, dist.ProcessGroup | None] = {}

STATE: dict[str, Any] = {
    "consumed_samples": 640,
    "counters": {"adam_step": 10},
    "config": {"seed": 1234, "optim": {"lr": 3e-4}},
    "tokenizer": "sha256:0123",
    "schedule": {"name": "cosine"},
    "data": {"phases": [[0, 100]]},
    "rng": {},
}


def first_ranks(count: int, world_size: int) -> dist.ProcessGroup | None:
    """In a rank: the group of the first `count`. Made once for all counts, by all ranks at once: groups are dear."""
    if not _GROUPS:
        for n in range(1, world_size + 1):
            _GROUPS[n] = dist.new_group(list(range(n)), backend="gloo")
    return _GROUPS[count]


def fresh_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(rank, size, *args)` on ranks that may die of it: results or tracebacks, None where a rank died."""
    results: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            here, there = PROCESSES.Pipe()
            process = PROCESSES.Process(target=_join, args=(rank, size, folder, there, function, args), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        for pipe in pipes:
            assert pipe.poll(PATIENCE_SECONDS), "a rank hangs"
            try:
                results.append(pipe.recv())
            except EOFError:
                results.append(None)
        for process in processes:
            process.kill()
            process.join()
    return results


def _join(rank: int, size: int, folder: str, pipe: Connection, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        pipe.send(function(rank, size, *args))
    except Exception:
        pipe.send(traceback.format_exc())


def run_alone(function: Callable[..., None], *args: Any, timeout: float = PATIENCE_SECONDS) -> int:
    """Run `function(*args)` in a process of its own and return its exit code."""
    process = PROCESSES.Process(target=_alone, args=(function, *args), daemon=True)
    process.start()
    process.join(timeout)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def start_alone(function: Callable[..., None], *args: Any) -> Any:
    """Start `function(*args)` in a process of its own."""
    process = PROCESSES.Process(target=_alone, args=(function, *args), daemon=True)
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
