"""Exact duplicates: 128-bit hashes of the text, sorted; of equal texts, the first in recipe order is kept.

    hash    one task per shard      the hash of every remaining document
    decide  one task per partition  the documents whose hash is in 1/P of the range: about 4 million at most

Prose is compared without letter case and runs of white space, code without white space at line ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_tools.documents import Corpus, Document
from data_tools.recipe import ExactConfig
from data_tools.steps import Progress, Step
from megatron_lite.atomic import write_array

DOCUMENTS_A_PARTITION = 4_000_000
KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("ordinal", "<i8")])
PAIR = np.dtype([("dropped", "<i8"), ("kept", "<i8")])


def content_key(document: Document) -> tuple[int, int]:
    """The two halves of the hash; documents with the same hash are duplicates."""
    if document.kind == "code":
        text = "\n".join(line.rstrip() for line in document.text.strip("\n").split("\n"))
    else:
        text = " ".join(document.text.lower().split())
    value = xxhash.xxh3_128_intdigest(text.encode())
    return value >> 64, value & ((1 << 64) - 1)


@dataclass
class HashStep(Step):
    """Writes `<shard>.keys.npy`: (high, low, ordinal) of every remaining document."""

    settings: ExactConfig
    corpus: Corpus

    def tasks(self) -> int:
        """One per shard."""
        return len(self.corpus.shards())

    def run_task(self, rank: int, progress: Progress) -> None:
        """Hash the documents of shard `rank`."""
        offset = int(self.corpus.offsets()[rank])
        keys = []
        for row, document in self.corpus.read(rank):
            keys.append((*content_key(document), offset + row))
            progress.add(len(document.text))
        write_array(self.folder / f"{rank:05d}.keys.npy", np.array(keys, KEY))


@dataclass
class ExactStep(Step):
    """Writes `all-<partition>.npy` (dropped ordinals) and `pairs-<partition>.npy` (each with the copy that is kept)."""

    settings: ExactConfig
    corpus: Corpus
    hashes: Path

    def tasks(self) -> int:
        """One per few million documents."""
        return max(1, -(-int(self.corpus.offsets()[-1]) // DOCUMENTS_A_PARTITION))

    def run_task(self, rank: int, progress: Progress) -> None:
        """Decide partition `rank` of the hashes."""
        pairs = duplicates(_partition(self.hashes, rank, self.tasks()))
        write_array(self.folder / f"pairs-{rank:05d}.npy", pairs)
        write_array(self.folder / f"all-{rank:05d}.npy", np.sort(pairs["dropped"]))


def _partition(folder: Path, rank: int, parts: int) -> np.ndarray:
    """The keys of all shards whose high half is in part `rank` of `parts`."""
    found = [np.empty(0, KEY)]
    width = (1 << 64) // parts + 1
    for path in sorted(folder.glob("*.keys.npy")):
        keys = np.load(path)
        found.append(keys[(keys["high"] // np.uint64(width)) == rank] if parts > 1 else keys)
    return np.concatenate(found)


def duplicates(keys: np.ndarray) -> np.ndarray:
    """A PAIR for every document with the key of an earlier one; `kept` is the earliest."""
    keys = keys[np.lexsort((keys["ordinal"], keys["low"], keys["high"]))]
    same = (keys["high"][1:] == keys["high"][:-1]) & (keys["low"][1:] == keys["low"][:-1])
    follows = np.concatenate([[False], same]) if len(keys) else np.empty(0, bool)
    leader = np.maximum.accumulate(np.where(follows, 0, np.arange(len(keys)))) if len(keys) else np.empty(0, np.int64)
    pairs = np.empty(int(follows.sum()), PAIR)
    pairs["dropped"] = keys["ordinal"][follows]
    pairs["kept"] = keys["ordinal"][leader[follows]]
    return np.sort(pairs, order="dropped")
