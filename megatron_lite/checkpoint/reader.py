"""Reading a checkpoint in one process without a process group: for evaluating, converting, starting from
weights.

Tensors come one by one, whole, assembled from the boxes that the ranks of the run that saved them had
written; no more than one of them stands in memory.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_lite.checkpoint.directory import checkpoint_problem, file_problem, list_steps
from megatron_lite.checkpoint.manifest import MANIFEST, dtype_from, read_manifest, step_name
from megatron_lite.errors import CheckpointError

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


class SavedTensors(Mapping[str, torch.Tensor]):
    """Global name -> whole global CPU tensor of a checkpoint, read anew each time it is asked for.

    prefix: only names that begin with it, and without it (`model.` for the weights).
    verify: hash the files that hold them first.
    Raises CheckpointError for damage when made, KeyError for unknown names.
    """

    def __init__(self, path: str | Path, *, prefix: str = "", verify: bool = True) -> None:
        self.path = Path(path)
        self.prefix = prefix
        self.entries = {name: entry for name, entry in describe(path).items() if name.startswith(prefix)}
        self._files = read_manifest(self.path)["files"]
        self._boxes = _boxes(self.path, set(self.entries), self._files)
        self._open: dict[str, Any] = {}
        if verify:
            self.verify(self)

    def verify(self, names: Iterable[str]) -> None:
        """Hash the files that hold `names`. Raises CheckpointError."""
        for file in sorted({file for name in names for file, _ in self._boxes[self.prefix + name]}):
            problem = file_problem(self.path / file, self._files[file])
            if problem:
                raise CheckpointError(problem)

    def __getitem__(self, name: str) -> torch.Tensor:
        name = self.prefix + name
        shape, dtype = self.entries[name]
        boxes = self._boxes[name]
        # mapped files count as this process's memory: only those of the tensor at hand stay open
        self._open = {file: self._open.get(file) or _opened(self.path / file) for file, _ in boxes}
        whole = torch.empty(shape, dtype=dtype)
        filled = 0
        for file, offsets in boxes:
            box = self._open[file].get_tensor(name)
            target = whole
            for dim, (start, size) in enumerate(zip(offsets, box.shape)):
                target = target.narrow(dim, start, size)
            target.copy_(box)
            filled += box.numel()
        if filled != whole.numel():
            raise CheckpointError(f"{self.path} holds {filled} of the {whole.numel()} numbers of {name!r}")
        return whole

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def load_tensors(
    path: str | Path, names: Iterable[str] | None = None, *, verify: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, whole global CPU tensor) for `names`, all when None, in the order given; lazily.

    Raises ValueError for unknown names and CheckpointError for damage, both before the first tensor.
    """
    tensors = SavedTensors(path, verify=False)
    wanted = list(tensors) if names is None else list(names)
    unknown = [name for name in wanted if name not in tensors]
    if unknown:
        raise ValueError(f"{path} holds no tensors {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}")
    if verify:
        tensors.verify(wanted)
    return ((name, tensors[name]) for name in wanted)


def _boxes(path: Path, wanted: set[str], files: Iterable[str]) -> dict[str, list[tuple[str, list[int]]]]:
    """Name -> [(file, offsets of its box)], from the headers."""
    boxes: dict[str, list[tuple[str, list[int]]]] = {name: [] for name in wanted}
    for file in sorted(files):
        stream = _opened(path / file)
        try:
            places = json.loads((stream.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in wanted.intersection(stream.keys()):
                boxes[name].append((file, places[name]["saved_offsets"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path / file} does not say where its boxes lie: {error!r}") from error
    return boxes


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be opened: {error!r}") from error
