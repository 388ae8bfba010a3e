"""Near duplicates: MinHash signatures over word n-grams, locality-sensitive hashing, and a check of every candidate.

    signatures  one task per shard  b x r minima of the n-gram hashes under random linear maps (Broder 1997)
    candidates  one task per band   pairs that agree in a band and in at least `threshold` of ALL b x r minima
    decide      one task            in recipe order, a document is dropped if it is similar to an earlier one that is kept

P(same minimum) = J, the Jaccard similarity of the n-gram sets; P(candidate) = 1 - (1 - J^r)^b. The estimate of J from k = b r
minima has the standard deviation sqrt(J (1 - J) / k): 0.046 at J = 0.5 with k = 120, so the threshold 0.75 is 5 deviations above;
at J = 0.95 it is 10 deviations below, and 1 - P(candidate) is 10^-11.

Notable features:
- bands only propose candidates (recall); precision comes from the check of all minima
- no chains: a document is dropped only for a kept document that is itself similar, not for a duplicate of a duplicate
- the result is a function of the documents and their order, not of tasks or workers
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.documents import Corpus
from data_tools.recipe import NearConfig
from data_tools.stages.exact_dedup import PAIR
from data_tools.steps import Progress, Step
from data_tools.text.hashing import mix, ngram_hashes, word_hashes
from megatron_lite.atomic import write_array

SHINGLES_A_BLOCK = 2_048
# In larger buckets documents are compared with leaders only: 10^4 copies must not cost 10^8 comparisons.
FULL_COMPARISON = 48


class MinHash:
    """Signatures: `signature(text)` is uint32 (bands * rows), or None for a text without words."""

    def __init__(self, config: NearConfig) -> None:
        self.config = config
        generator = np.random.Generator(np.random.PCG64(config.seed))
        count = config.bands * config.rows
        self._factor = generator.integers(1 << 31, size=(count, 1), dtype=np.uint32) * np.uint32(2) + np.uint32(1)
        self._shift = generator.integers(1 << 32, size=(count, 1), dtype=np.uint32)

    def signature(self, text: str) -> np.ndarray | None:
        """The minima of (a x + b) mod 2^32 over the hashes x of the text's n-grams; a is odd, so each map is a bijection."""
        shingles = (ngram_hashes(word_hashes(text), self.config.ngram) >> np.uint64(32)).astype(np.uint32)
        if not len(shingles):
            return None
        best = None
        for start in range(0, len(shingles), SHINGLES_A_BLOCK):
            values = shingles[None, start : start + SHINGLES_A_BLOCK] * self._factor
            values += self._shift
            minima = values.min(axis=1)
            best = minima if best is None else np.minimum(best, minima)
        return best


@dataclass
class SignatureStep(Step):
    """Writes `<shard>.signatures.npy` (N, bands * rows) and `<shard>.ordinals.npy` (N)."""

    settings: NearConfig
    corpus: Corpus

    def tasks(self) -> int:
        """One per shard."""
        return len(self.corpus.shards())

    def run_task(self, rank: int, progress: Progress) -> None:
        """Compute the signatures of shard `rank`."""
        minhash = MinHash(self.settings)
        offset = int(self.corpus.offsets()[rank])
        ordinals, signatures = [], []
        for row, document in self.corpus.read(rank):
            progress.add(len(document.text))
            signature = minhash.signature(document.text)
            if signature is not None:
                ordinals.append(offset + row)
                signatures.append(signature)
        width = self.settings.bands * self.settings.rows
        write_array(self.folder / f"{rank:05d}.signatures.npy", np.array(signatures, np.uint32).reshape(-1, width))
        write_array(self.folder / f"{rank:05d}.ordinals.npy", np.array(ordinals, np.int64))


@dataclass
class CandidateStep(Step):
    """Writes `<band>.pairs.npy`: (later, earlier) ordinals of similar documents that share this band."""

    settings: NearConfig
    corpus: Corpus
    signatures: Path

    def tasks(self) -> int:
        """One per band."""
        return self.settings.bands

    def run_task(self, rank: int, progress: Progress) -> None:
        """Compare the documents that share band `rank`."""
        store = SignatureStore(self.signatures)
        first = rank * self.settings.rows
        parts = [_band_keys(part[:, first : first + self.settings.rows]) for part in store.parts]
        keys = np.concatenate([np.empty(0, np.uint64), *parts])
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order][:1] + np.uint64(1)))
        lengths = np.diff(np.append(starts, len(keys)))
        pairs = []
        for start, length in zip(starts[lengths > 1], lengths[lengths > 1]):
            bucket = order[start : start + length]
            pairs += similar_pairs(store.take(bucket), bucket, self.settings.threshold)
        found = np.array([(store.ordinals[a], store.ordinals[b]) for a, b in pairs], PAIR)
        write_array(self.folder / f"{rank:05d}.pairs.npy", np.unique(found))


def _band_keys(columns: np.ndarray) -> np.ndarray:
    """uint64 (N): one hash for the rows of a band of uint32 (N, rows)."""
    keys = np.zeros(len(columns), np.uint64)
    for row in range(columns.shape[1]):
        keys = mix(keys + columns[:, row].astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return keys


class SignatureStore:
    """All signatures, memory-mapped: `parts` in order, `ordinals` of all, `take(indices)` -> (n, k)."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("*.signatures.npy"))
        self.parts = [_map(path) for path in paths]
        ordinals = [np.load(path) for path in sorted(folder.glob("*.ordinals.npy"))]
        self.ordinals = np.concatenate([np.empty(0, np.int64), *ordinals])
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in self.parts])])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The signatures of some documents."""
        where = np.searchsorted(self._starts, indices, side="right") - 1
        return np.stack([self.parts[part][index - self._starts[part]] for part, index in zip(where, indices)])


def _map(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except ValueError:  # an empty array cannot be mapped
        return np.load(path)


def similar_pairs(signatures: np.ndarray, indices: np.ndarray, threshold: float) -> list[tuple[int, int]]:
    """(later, earlier) of the documents of one bucket whose signatures agree in at least `threshold` of their entries."""
    pairs = []
    remaining = np.arange(len(indices))
    everyone = len(indices) <= FULL_COMPARISON
    while len(remaining) > 1:
        leader, others = remaining[0], remaining[1:]
        close = (signatures[others] == signatures[leader]).mean(axis=1) >= threshold
        pairs += [(int(indices[other]), int(indices[leader])) for other in others[close]]
        remaining = others if everyone else others[~close]
    return pairs


@dataclass
class NearStep(Step):
    """Writes `all-00000.npy` (dropped ordinals) and `pairs-00000.npy` (each with the document that is kept)."""

    settings: NearConfig
    candidates: Path

    def run_task(self, rank: int, progress: Progress) -> None:
        """Decide over all pairs."""
        parts = [np.load(path) for path in sorted(self.candidates.glob("*.pairs.npy"))]
        pairs = decide(np.unique(np.concatenate([np.empty(0, PAIR), *parts])))
        write_array(self.folder / "pairs-00000.npy", pairs)
        write_array(self.folder / "all-00000.npy", pairs["dropped"].copy())


def decide(pairs: np.ndarray) -> np.ndarray:
    """Greedy, in recipe order: a document is dropped if it is similar to an earlier document that is kept.

    `pairs`: PAIR with the later document as `dropped` and the earlier as `kept`. Returns the dropped ones, sorted.
    """
    earlier: dict[int, list[int]] = defaultdict(list)
    for later, before in pairs.tolist():
        earlier[later].append(before)
    gone: dict[int, int] = {}
    for document in sorted(earlier):
        staying = [other for other in earlier[document] if other not in gone]
        if staying:
            gone[document] = min(staying)
    return np.array(sorted(gone.items()), PAIR) if gone else np.empty(0, PAIR)
