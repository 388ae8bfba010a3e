"""Finding a checkpoint and verifying it once, with the work divided over the ranks.

Notable features
- Rank 0 reads the manifest, looks at the directory and the sizes, and tells the others; each rank hashes its
  share of the files. One verdict for all.
- A verified checkpoint is not verified again unless one of its files is replaced or written.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_lite.block_hash import BLOCK, block_digest, hash_of_blocks
from megatron_lite.checkpoint.directory import list_steps, problem_without_hashing, unreadable
from megatron_lite.checkpoint.manifest import MANIFEST, dtype_from, read_manifest, step_name
from megatron_lite.checkpoint.reader import CheckpointTensors, Shards, header_shards
from megatron_lite.errors import CheckpointError, error_text
from megatron_lite.ranks import Ranks
from megatron_lite.tensor_files import read_whole

logger = logging.getLogger(__name__)


@dataclass
class _Look:
    """What rank 0 sees of a checkpoint without hashing it."""

    problem: str | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    shards: Shards | None = None
    signature: str = ""


class Verifier:
    """Opens checkpoints, verified. Collective: every rank calls the same methods."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.damaged: set[Path] = set()  # those looked at last and found damaged
        self._verified: dict[Path, tuple[str, set[str]]] = {}  # path -> (signature, files that were hashed)

    def open(self, path: Path, *, prefixes: tuple[str, ...] = ("",)) -> CheckpointTensors:
        """The tensors of a checkpoint; the files of those whose names begin with one of `prefixes` are hashed.

        Raises CheckpointError when it is damaged.
        """
        problem, tensors = self.look(path, prefixes=prefixes)
        if tensors is None:
            raise CheckpointError(f"the checkpoint {path} cannot be loaded: {problem}")
        return tensors

    def look(self, path: Path, *, prefixes: tuple[str, ...] = ("",)) -> tuple[str | None, CheckpointTensors | None]:
        """As `open`, but what is wrong with it is returned: (problem, None) or (None, tensors)."""
        seen = self.ranks.first("look", lambda: _look(path))
        problem, tensors = seen.problem, None
        if problem is None:
            tensors = CheckpointTensors(path, seen.manifest, seen.shards)
            signature, hashed = self._verified.get(path, ("", set()))
            hashed = hashed if signature == seen.signature else set()
            files = tensors.files_of(name for name in tensors.names() if name.startswith(prefixes))
            problem = self._hash(path, seen.manifest["files"], files - hashed)
        if problem is not None:
            self.damaged.add(path)
            return problem, None
        self.damaged.discard(path)
        self._verified[path] = seen.signature, hashed | files
        return None, tensors

    def newest(
        self, directory: Path, steps: Iterable[int], *, prefixes: tuple[str, ...] = ("",)
    ) -> CheckpointTensors | None:
        """The newest of the checkpoints in `directory` that is not damaged. Warns of those that are."""
        for step in sorted(steps, reverse=True):
            problem, tensors = self.look(directory / step_name(step), prefixes=prefixes)
            if tensors is not None:
                return tensors
            if self.ranks.rank == 0:
                logger.warning("checkpoint of step %d is skipped: %s", step, problem)
        return None

    def find(self, path: str | Path, *, prefixes: tuple[str, ...] = ("",)) -> CheckpointTensors:
        """The checkpoint that a path means: a checkpoint directory itself, or the newest undamaged one of a run directory.

        Raises ValueError when there is none, CheckpointError when the named one is damaged.
        """
        path = Path(path)
        named, found = self.ranks.first("find", lambda: _candidates(path))
        if named:
            return self.open(path, prefixes=prefixes)
        for directory, steps in found:
            tensors = self.newest(directory, steps, prefixes=prefixes)
            if tensors is not None:
                return tensors
        raise ValueError(not_found(path))

    def forget(self, path: Path) -> None:
        """Forget that the checkpoint was verified, because it was written."""
        self._verified.pop(path, None)
        self.damaged.discard(path)

    def _hash(self, path: Path, entries: dict[str, Any], files: Collection[str]) -> str | None:
        if not files:
            return None
        shares = hash_shares({name: entries[name] for name in sorted(files)}, self.ranks.size)
        everyone = self.ranks.gather("verify", lambda: _digests(path, shares[self.ranks.rank]))
        return self.ranks.first("verify", lambda: _hash_problem(path, entries, everyone))


Blocks = list[tuple[str, int | None]]  # (file, number of a block of it, or None for the whole file)


def hash_shares(entries: dict[str, Any], ranks: int) -> list[Blocks]:
    """What each rank hashes of the files: blocks that follow each other, the same number of bytes for all, give or take a block.

    A file of format 1, whose hash is that of its whole content, counts as one block.
    """
    shares: list[Blocks] = [[] for _ in range(ranks)]
    total = max(1, sum(entry["size"] for entry in entries.values()))
    done = 0
    for name, entry in entries.items():
        size = entry["size"]
        sizes = [size] if "sha256" in entry else [min(BLOCK, size - start) for start in range(0, size, BLOCK)]
        for block, length in enumerate(sizes):
            middle = done + length // 2
            shares[min(middle * ranks // total, ranks - 1)].append((name, None if "sha256" in entry else block))
            done += length
    return shares


def _digests(path: Path, blocks: Blocks) -> dict[str, bytes | str]:
    """File -> the digests of these blocks of it, one after the other, or why they cannot be had."""
    found: dict[str, bytes | str] = {}
    for name, block in blocks:
        before = found.get(name, b"")
        if isinstance(before, bytes):
            try:
                found[name] = before + block_digest(path / name, block)
            except OSError as error:
                found[name] = unreadable(path / name, error)
    return found


def hash_of_files(folder: Path, patterns: Collection[str], ranks: Ranks) -> str:
    """One hash of the contents of the files that match, which are read once, with the work divided over the ranks. Collective.

    Raises CheckpointError naming a file that cannot be read.
    """
    found = ranks.first(
        "look",
        lambda: {p.name: {"size": p.stat().st_size} for pattern in patterns for p in sorted(folder.glob(pattern))},
    )
    shares = hash_shares(found, ranks.size)
    everyone = ranks.gather("hash", lambda: _digests(folder, shares[ranks.rank]))
    return ranks.first("hash", lambda: hash_of_blocks(b"".join(_joined(everyone).values())))


def _joined(everyone: list[dict[str, bytes | str]]) -> dict[str, bytes]:
    """File -> the digests of all its blocks: the ranks' blocks of a file come in the order of the ranks.

    Raises CheckpointError for the first file that a rank could not read.
    """
    digests: dict[str, bytes] = {}
    for found in everyone:
        for name, digest in found.items():
            if isinstance(digest, str):
                raise CheckpointError(digest)
            digests[name] = digests.get(name, b"") + digest
    return digests


def _hash_problem(path: Path, entries: dict[str, Any], everyone: list[dict[str, bytes | str]]) -> str | None:
    """The first file that is not what its hash says."""
    try:
        digests = _joined(everyone)
    except CheckpointError as error:
        return str(error)
    for name, digest in digests.items():
        entry = entries[name]
        if entry["sha256"] != digest.hex() if "sha256" in entry else entry["blocks_sha256"] != hash_of_blocks(digest):
            return f"{path / name} is damaged: its SHA-256 is not the manifest's"
    return None


def find_checkpoint(path: str | Path) -> Path:
    """`Verifier.find` in one process, every file hashed: the directory."""
    path = Path(path)
    return path if (path / MANIFEST).exists() else Verifier().find(path).path


def not_found(path: Path) -> str:
    """The error message if `path` is none of the things that `Verifier.find` looks for."""
    return (
        f"{path} is not a checkpoint and not a run directory with a valid one in checkpoints/; check the path (a Hugging Face folder "
        "would have a config.json)"
    )


def newest_manifest(path: str | Path) -> dict[str, Any] | None:
    """The newest manifest of what a person means that can be read, or None; nothing is hashed."""
    named, found = _candidates(Path(path))
    if named:
        return read_manifest(path)
    for directory, steps in found:
        for step in reversed(steps):
            try:
                return read_manifest(directory / step_name(step))
            except CheckpointError as error:
                logger.warning("checkpoint of step %d is skipped: %s", step, error)
    return None


def describe(path: str | Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Global name -> (shape, dtype) of every tensor of a checkpoint, from its manifest alone."""
    tensors = read_manifest(path)["tensors"]
    return {name: (tuple(entry["shape"]), dtype_from(entry["dtype"])) for name, entry in tensors.items()}


def load_tensors(path: str | Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, whole global CPU tensor) for `names`, all when None, in the order given; lazily, in one process.

    Raises ValueError for unknown names and CheckpointError for damage, both before the first tensor.
    """
    known = describe(path)
    wanted = list(known) if names is None else list(names)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"{path} holds no tensors {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}")
    tensors = Verifier().open(Path(path), prefixes=tuple(wanted))
    return ((name, read_whole(tensors, name)) for name in wanted)


def _candidates(path: Path) -> tuple[bool, list[tuple[Path, list[int]]]]:
    """(is it a checkpoint itself, [(directory, steps)] where the checkpoints of a run may be)."""
    if (path / MANIFEST).exists():
        return True, []
    return False, [(directory, list_steps(directory)) for directory in (path / "checkpoints", path)]


def _look(path: Path) -> _Look:
    try:
        manifest = read_manifest(path)
        problem = problem_without_hashing(path, manifest)
        if problem is not None:
            return _Look(problem)
        return _Look(None, manifest, header_shards(path, manifest), _signature(path, manifest))
    except Exception as error:
        return _Look(error_text(error))


def _signature(path: Path, manifest: dict[str, Any]) -> str:
    """Changes when a file of the checkpoint is replaced or written."""
    stats = []
    for name in (MANIFEST, *manifest["files"]):
        stat = (path / name).stat()
        stats.append((name, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return str(hash(tuple(stats)))
