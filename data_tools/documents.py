"""Documents between the stages: shards of zstd-compressed JSON lines, and lists of dropped documents beside them.

Only `read` and `normalize` write text. Every later stage writes *which* documents it drops, so a filter or a deduplication
costs a few bytes per document on disk, and a changed threshold does not copy the corpus again.

Notable features:
- a document's *ordinal* is its number over all shards in recipe order: shard offset + row. "The first copy stays" means
  the lowest ordinal, whatever the number of workers
- two kinds of drop lists: rows of one shard (`00012.drop.npy`) and sorted ordinals of the whole corpus (`all-0003.npy`)
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash
import zstandard

from megatron_lite.atomic import atomic_path, read_json, write_array, write_json

SHARD_SUFFIX = ".jsonl.zst"
OFFSETS = "offsets.npy"
SOURCES = "sources.json"
HASH_RANGE = 1 << 64


@dataclass(slots=True)
class Document:
    """One text and what is known about it. `kind` is "prose" or "code"; `dataset` names the .bin/.idx pair that it is written to."""

    text: str
    id: str
    source: str
    group: str
    kind: str
    language: str
    license: str
    dataset: str = ""


class ShardWriter:
    """Writes one shard, which appears under its final name only when complete. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.documents = 0
        self.text_bytes = 0
        self._atomic = atomic_path(path)
        self._file: Any = None

    def __enter__(self) -> ShardWriter:
        temporary = self._atomic.__enter__()
        self._raw = temporary.open("wb")
        self._file = zstandard.ZstdCompressor(level=1).stream_writer(self._raw, closefd=False)
        return self

    def write(self, document: Document) -> None:
        """Append one document."""
        assert self._file is not None
        self._file.write(orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE))
        self.documents += 1
        self.text_bytes += len(document.text.encode())

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        assert self._file is not None
        try:
            self._file.close()
            self._raw.close()
        except OSError as failure:
            kind, error, trace = type(failure), failure, failure.__traceback__
        self._atomic.__exit__(kind, error, trace)


def read_shard(path: Path, skip: np.ndarray | None = None) -> Iterator[tuple[int, Document]]:
    """(row, document) of one shard without the rows in `skip`."""
    skipped = set() if skip is None else set(skip.tolist())
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        for row, line in enumerate(io.BufferedReader(stream, 1 << 20)):
            if row not in skipped:
                yield row, Document(**orjson.loads(line))


@dataclass
class Corpus:
    """The normalized shards, their document counts, and the folders of the stages that have dropped documents so far."""

    folder: Path
    dropped_by: Sequence[Path] = field(default_factory=list)

    def shards(self) -> list[Path]:
        """Every shard, in recipe order."""
        return sorted(self.folder.glob(f"*{SHARD_SUFFIX}"))

    def offsets(self) -> np.ndarray:
        """int64 (shards + 1): the ordinal of every shard's first document, then the number of documents."""
        summary = self.folder / OFFSETS
        if summary.exists():
            return np.load(summary)
        counts = [read_json(stats_path(self.folder, i))["documents_out"] for i in range(len(self.shards()))]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    def bytes_by_source(self) -> dict[str, int]:
        """Source -> bytes of normalized text."""
        summary = self.folder / SOURCES
        if summary.exists():
            return read_json(summary)
        sizes: dict[str, int] = {}
        for shard in range(len(self.shards())):
            for source, (_, size) in read_json(stats_path(self.folder, shard))["kept"].items():
                sizes[source] = sizes.get(source, 0) + size
        return sizes

    def summarize(self) -> None:
        """Write offsets and sizes once, so that no task has to read the counts of all others."""
        write_json(self.folder / SOURCES, self.bytes_by_source())
        write_array(self.folder / OFFSETS, self.offsets())

    def dropped_rows(self, shard: int) -> np.ndarray:
        """Sorted int64 rows of `shard` that an earlier stage dropped."""
        offsets = self.offsets()
        rows = [np.empty(0, np.int64)]
        for folder in self.dropped_by:
            local = drop_path(folder, shard)
            if local.exists():
                rows.append(np.load(local))
            for path in sorted(folder.glob("all-*.npy")):
                ordinals = np.load(path, mmap_mode="r")
                first, last = np.searchsorted(ordinals, offsets[shard : shard + 2])
                rows.append(ordinals[first:last] - offsets[shard])
        return np.unique(np.concatenate(rows))

    def read(self, shard: int) -> Iterator[tuple[int, Document]]:
        """(row, document) of the documents of `shard` that no stage has dropped."""
        return read_shard(self.shards()[shard], self.dropped_rows(shard))


def stats_path(folder: Path, rank: int) -> Path:
    """The file with the counts of one task."""
    return folder / f"{rank:05d}.stats.json"


def drop_path(folder: Path, shard: int) -> Path:
    """The file with the rows of one shard that a stage drops."""
    return folder / f"{shard:05d}.drop.npy"


def is_held_out(document: Document, share: float) -> bool:
    """Whether a document is held out for validation. Decided by its text alone, so equal texts get the same answer."""
    return xxhash.xxh3_64_intdigest(document.text.encode(), seed=1) < share * HASH_RANGE
