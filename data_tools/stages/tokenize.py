"""Text to tokens: documents shuffled over the whole dataset, written as `.bin/.idx` with a sidecar.

    encode   one task per shard     token ids of every document: one file per dataset and split, documents sorted by key
    merge    one task per dataset   the sorted files merged into one `.bin/.idx` pair

Documents are ordered by a hash of (seed, text): a global shuffle that depends only on the documents, needs no second pass, and
reads every file sequentially. A merge holds `merge_bytes` in memory, whatever the size of the dataset.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_tools.documents import Corpus, Document, is_held_out
from data_tools.recipe import TokenizeConfig
from data_tools.steps import Progress, Step
from data_tools.take_tokenizer import FastTokenizer, tokenizer_identity
from megatron_lite.atomic import read_json, write_array, write_json
from megatron_lite.data.indexed import IndexedWriter, best_dtype
from megatron_lite.data.sidecar import Sidecar, write_sidecar

BATCH_DOCUMENTS = 512
BATCH_CHARS = 2_000_000
ENTRY = np.dtype([("key", "<u8"), ("ordinal", "<i8"), ("tokens", "<i8")])


@dataclass
class EncodeStep(Step):
    """Writes `<dataset>/<split>/<shard>.{tokens,documents}.npy` and `<shard>.datasets.json`."""

    settings: TokenizeConfig
    corpus: Corpus
    tokenizer: Path
    seed: int

    def tasks(self) -> int:
        """One per shard."""
        return len(self.corpus.shards())

    def run_task(self, rank: int, progress: Progress) -> None:
        """Encode shard `rank`."""
        identity = tokenizer_identity(self.tokenizer)
        tokenizer = FastTokenizer(self.tokenizer / "tokenizer", identity["eod"])
        dtype = best_dtype(identity["vocab_size"])
        offset = int(self.corpus.offsets()[rank])
        entries: dict[tuple[str, str], list[tuple[int, int, int]]] = defaultdict(list)
        tokens: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
        facts: dict[str, dict] = {}
        for batch in _batches(self.corpus.read(rank)):
            for (row, document), ids in zip(batch, tokenizer.encode([document.text for _, document in batch])):
                split = "validation" if is_held_out(document, self.settings.held_out) else "train"
                key = xxhash.xxh3_64_intdigest(document.text.encode(), seed=self.seed)
                entries[document.dataset, split].append((key, offset + row, len(ids)))
                tokens[document.dataset, split].append(ids.astype(dtype, copy=False))
                _note(facts.setdefault(f"{document.dataset}/{split}", {}), document, len(ids))
            progress.add(sum(len(document.text.encode()) for _, document in batch))
        for (dataset, split), found in entries.items():
            order = sorted(range(len(found)), key=found.__getitem__)
            folder = self.folder / dataset / split
            parts = tokens[dataset, split]
            write_array(folder / f"{rank:05d}.tokens.npy", np.concatenate([parts[i] for i in order]))
            write_array(folder / f"{rank:05d}.documents.npy", np.array([found[i] for i in order], ENTRY))
        write_json(self.folder / f"{rank:05d}.datasets.json", facts)


def _batches(documents: Iterator[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    """Batches limited in documents and in characters: a batch of books must not take gigabytes."""
    batch: list[tuple[int, Document]] = []
    size = 0
    for item in documents:
        batch.append(item)
        size += len(item[1].text)
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _note(facts: dict, document: Document, tokens: int) -> None:
    for name, value in (("languages", document.language), ("licenses", document.license)):
        counts = facts.setdefault(name, {})
        counts[value] = counts.get(value, 0) + 1
    facts["group"] = document.group
    facts["bytes"] = facts.get("bytes", 0) + len(document.text.encode())
    facts["tokens"] = facts.get("tokens", 0) + tokens
    facts["documents"] = facts.get("documents", 0) + 1


def merged_facts(encoded: Path) -> dict[str, dict]:
    """`dataset/split` -> group, languages and licenses (with their number of documents), bytes, tokens, documents."""
    total: dict[str, dict] = {}
    for path in sorted(encoded.glob("*.datasets.json")):
        for name, facts in read_json(path).items():
            _accumulate(total.setdefault(name, {}), facts)
    return dict(sorted(total.items()))


def plan_datasets(encoded: Path, min_documents: int) -> dict[str, dict]:
    """`name/split` -> facts with `members`: the encoded datasets of which it is made (several only for `<group>_small`)."""
    found = merged_facts(encoded)
    documents: dict[str, int] = defaultdict(int)
    for name, facts in found.items():
        documents[name.rsplit("/", 1)[0]] += facts["documents"]
    plan: dict[str, dict] = {}
    for name, facts in found.items():
        dataset, split = name.rsplit("/", 1)
        small = documents[dataset] < min_documents
        target = plan.setdefault(f"{facts['group']}_small/{split}" if small else name, {"members": []})
        target["members"].append(name)
        _accumulate(target, facts)
    return dict(sorted(plan.items()))


def _accumulate(entry: dict, facts: dict) -> None:
    """Add the counts of `facts` to `entry`; languages and licenses by number of documents."""
    entry["group"] = facts["group"]
    for kind in ("languages", "licenses"):
        counts = entry.setdefault(kind, {})
        for value, count in facts[kind].items():
            counts[value] = counts.get(value, 0) + count
        entry[kind] = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    for kind in ("bytes", "tokens", "documents"):
        entry[kind] = entry.get(kind, 0) + facts[kind]


def prefix_name(dataset: str, split: str) -> str:
    """The name of the pair of a dataset and split, without folder and suffix."""
    return dataset if split == "train" else f"{dataset}.validation"


@dataclass
class MergeStep(Step):
    """Writes `<dataset>[.validation].{bin,idx,json}`."""

    settings: TokenizeConfig
    encoded: Path
    tokenizer: Path

    def tasks(self) -> int:
        """One per dataset and split."""
        return len(plan_datasets(self.encoded, self.settings.min_documents))

    def run_task(self, rank: int, progress: Progress) -> None:
        """Merge dataset `rank`."""
        name, facts = list(plan_datasets(self.encoded, self.settings.min_documents).items())[rank]
        dataset, split = name.rsplit("/", 1)
        identity = tokenizer_identity(self.tokenizer)
        prefix = self.folder / prefix_name(dataset, split)
        with IndexedWriter(prefix, best_dtype(identity["vocab_size"])) as writer:
            for document in merge_sorted([self.encoded / m for m in facts["members"]], self.settings.merge_bytes):
                writer.add_document(document)
                progress.add(document.nbytes)
        sidecar = Sidecar(
            tokenizer=identity["fingerprint"],
            tokenizer_name=identity["name"],
            eod=identity["eod"],
            vocab_size=identity["vocab_size"],
            documents=facts["documents"],
            tokens=facts["tokens"],
            languages=facts["languages"],
            licenses=facts["licenses"],
        )
        write_sidecar(prefix, sidecar)


def merge_sorted(folders: list[Path], memory_bytes: int) -> Iterator[np.ndarray]:
    """The documents of all sorted files of `folders` in the order of their keys; a range of keys at a time in memory."""
    entries = [np.load(path, mmap_mode="r") for folder in folders for path in sorted(folder.glob("*.documents.npy"))]
    tokens = [np.load(path, mmap_mode="r") for folder in folders for path in sorted(folder.glob("*.tokens.npy"))]
    total = sum(part.nbytes for part in tokens)
    ranges = max(1, -(-total // memory_bytes))
    edges = [(i << 64) // ranges for i in range(ranges + 1)]
    read = [[0, 0] for _ in entries]  # per file: documents and tokens consumed
    for upper in edges[1:]:
        found: list[tuple[int, int, int, int, int]] = []
        texts = []
        for part, (keys, position) in enumerate(zip(entries, read)):
            first, at = position
            last = len(keys) if upper >> 64 else int(np.searchsorted(keys["key"], np.uint64(upper)))
            lengths = keys["tokens"][first:last]
            size = int(lengths.sum())
            ends = np.cumsum(lengths)
            found += zip(
                keys["key"][first:last].tolist(),
                keys["ordinal"][first:last].tolist(),
                itertools.repeat(part),
                (ends - lengths).tolist(),
                ends.tolist(),
            )
            texts.append(np.array(tokens[part][at : at + size]))
            read[part] = [last, at + size]
        for _, _, part, start, end in sorted(found):
            yield texts[part][start:end]
