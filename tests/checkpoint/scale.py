"""What saving and restoring cost one rank, counted: bytes, files and collectives. Each rank's share of the model stays the same."""

from __future__ import annotations

import builtins
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_lite import tensor_files
from megatron_lite.block_hash import BLOCK
from megatron_lite.checkpoint import CheckpointConfig, CheckpointStore, Layout, Piece, opening, reader
from tests.checkpoint.processes import STATE, first_ranks

TP, ROWS, COLUMNS, LAYERS = 2, 256, 128, 4
BYTES = 3 * LAYERS * ROWS * COLUMNS * 4  # of a rank's shards of the matrices


def pieces_of(rank: int, ranks: int) -> dict[str, Piece]:
    """tp 2 x dp ranks / 2: matrices cut by both, and a norm that tensor parallelism does not cut."""
    at = Layout(rank // TP, ranks // TP, rank % TP, TP)
    shapes = {}
    for layer in range(LAYERS):
        shapes[f"layers.{layer}.weight"] = (ROWS * ranks, COLUMNS), 0
        shapes[f"layers.{layer}.norm"] = (8 * ranks,), None
    return {
        f"{kind}.{name}": at.piece(torch.ones(at.box(shape, tp_dim=dim)[1]), shape, tp_dim=dim)
        for kind in ("model", "exp_avg", "exp_avg_sq")
        for name, (shape, dim) in shapes.items()
    }


def measure(rank: int, ranks: int, folder: str) -> dict[str, Counter[str]]:
    """{save, restore} -> what this rank did."""
    config = CheckpointConfig()
    group = first_ranks(ranks, ranks)
    found = {}
    with counted() as found["save"]:
        CheckpointStore(folder, config, group=group).save(1, pieces_of(rank, ranks), STATE)
    pieces = pieces_of(rank, ranks)
    with counted() as found["restore"]:
        store = CheckpointStore(folder, config, group=group)
        path = store.newest_valid()
        assert path is not None
        store.load(path, pieces)
    return found


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count this process's work on files and its collectives."""
    counts: Counter[str] = Counter()

    def count(where: Any, name: str, note: Callable[[tuple[Any, ...], dict[str, Any], Any], None]) -> Any:
        honest = getattr(where, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = honest(*args, **kwargs)
            note(args, kwargs, result)
            return result

        return patch.object(where, name, wrapped)

    def opened(args: Any, kwargs: Any, result: Any) -> None:
        if str(args[0]).endswith((".safetensors", ".json")):
            counts["files opened"] += 1

    def read(args: Any, kwargs: Any, result: torch.Tensor) -> None:
        counts["bytes of tensors read"] += result.nbytes

    def hashed(args: tuple[Path, int], kwargs: Any, result: Any) -> None:
        counts["bytes hashed"] += min(BLOCK, args[0].stat().st_size - args[1] * BLOCK)

    def synced(args: Any, kwargs: Any, result: Any) -> None:
        counts["fsyncs"] += 1

    def collective(args: Any, kwargs: Any, result: Any) -> None:
        counts["collectives"] += 1

    with ExitStack() as stack:
        for where, name, note in (
            (builtins, "open", opened), (os, "open", opened), (tensor_files, "safe_open", opened), (os, "fsync", synced),
            (reader, "read_slice", read), (opening, "block_digest", hashed), (dist, "monitored_barrier", collective),
            (dist, "all_reduce", collective), (dist, "broadcast_object_list", collective), (dist, "gather_object", collective),
            (dist, "all_gather_object", collective),
        ):  # fmt: skip
            stack.enter_context(count(where, name, note))
        yield counts
