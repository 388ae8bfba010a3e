"""Reading a checkpoint in one process without a process group: for evaluating, converting, starting from
weights.

Tensors come one by one, whole, assembled from the boxes that the ranks of the run that saved them had
written; no more than one of them stands in memory.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_lite.checkpoint.directory import list_steps
from megatron_lite.checkpoint.manifest import MANIFEST, dtype_from, read_manifest, step_name
from megatron_lite.checkpoint.ranks import CheckpointError
from megatron_lite.checkpoint.verify import checkpoint_problem, file_problem

logger = logging.getLogger(__name__)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a person means: the directory of one, or a run directory's newest valid one.

    Damaged ones of a run are skipped with a warning. Raises ValueError when there is none.
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        return path
    for directory in (path / "checkpoints", path):
        for step in reversed(list_steps(directory)):
            problem = checkpoint_problem(directory / step_name(step))
            if problem is None:
                return directory / step_name(step)
            logger.warning("checkpoint of step %d is skipped: %s", step, problem)
    raise ValueError(f"{path} is no checkpoint and no run directory with a valid one in checkpoints/")


def describe(path: str | Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Global name -> (shape, dtype) of every tensor of a checkpoint, from its manifest alone."""
    tensors = read_manifest(path)["tensors"]
    return {name: (tuple(entry["shape"]), dtype_from(entry["dtype"])) for name, entry in tensors.items()}


def load_tensors(
    path: str | Path, names: Iterable[str] | None = None, *, verify: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, whole global CPU tensor) for `names`, all when None, in the order given; lazily.

    verify: hash the files that hold them first. Raises ValueError for unknown names and CheckpointError for
        damage, both before the first tensor.
    """
    path = Path(path)
    tensors = describe(path)
    wanted = list(tensors) if names is None else list(names)
    unknown = [name for name in wanted if name not in tensors]
    if unknown:
        raise ValueError(f"{path} holds no tensors {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}")
    boxes = _boxes(path, set(wanted))
    files = read_manifest(path)["files"]
    if verify:
        for file in sorted({file for found in boxes.values() for file, _ in found}):
            problem = file_problem(path / file, files[file])
            if problem:
                raise CheckpointError(problem)
    return _assembled(path, {name: tensors[name] for name in wanted}, boxes)


def _boxes(path: Path, wanted: set[str]) -> dict[str, list[tuple[str, list[int]]]]:
    """Name -> [(file, offsets of its box)], from the headers."""
    boxes: dict[str, list[tuple[str, list[int]]]] = {name: [] for name in wanted}
    for file in sorted(read_manifest(path)["files"]):
        try:
            with safe_open(path / file, framework="pt") as stream:
                places = json.loads((stream.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
                for name in wanted.intersection(stream.keys()):
                    offsets = places[name]["saved_offsets"]
                    boxes[name].append((file, offsets))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path / file} has no sound header: {error!r}") from error
    return boxes


def _assembled(path: Path, tensors: dict[str, Any], boxes: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    streams: dict[str, Any] = {}
    for name, (shape, dtype) in tensors.items():
        # mapped files count as this process's memory: only those of the tensor at hand stay open
        streams = {
            file: streams[file] if file in streams else safe_open(path / file, framework="pt")
            for file, _ in boxes[name]
        }
        whole = torch.empty(shape, dtype=dtype)
        filled = 0
        for file, offsets in boxes[name]:
            box = streams[file].get_tensor(name)
            target = whole
            for dim, (start, size) in enumerate(zip(offsets, box.shape)):
                target = target.narrow(dim, start, size)
            target.copy_(box)
            filled += box.numel()
        if filled != math.prod(shape):
            raise CheckpointError(f"the files of {path} hold {filled} of the {math.prod(shape)} numbers of {name!r}")
        yield name, whole
