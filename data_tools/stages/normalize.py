"""The normalize stage in two steps: find the lines that recur in many documents of a source, then clean and label every document."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_tools.documents import SHARD_SUFFIX, Corpus, ShardWriter, read_shard
from data_tools.recipe import NormalizeConfig
from data_tools.steps import Progress, Step, Tally
from data_tools.text.language import identify
from data_tools.text.normalize import Normalizer, line_key
from megatron_lite.atomic import write_array

LINE = np.dtype([("key", "<u8"), ("documents", "<u4")])
LONGEST_NAME = 100
OTHER_FILES = ("corpus", "recipe", "report", "timing")  # of which the output folder has a .json


def read_shards(folder: Path) -> list[Path]:
    """The shards of the read step, in recipe order."""
    return sorted(folder.glob(f"*{SHARD_SUFFIX}"))


@dataclass
class CountLinesStep(Step):
    """Counts the documents of each shard that contain a line. Lines of a single document of the shard are not kept,
    which limits memory to the lines of one shard: a boilerplate line is missed only if it is rare in every shard.
    """

    settings: NormalizeConfig
    read: Path

    def tasks(self) -> int:
        """One per shard."""
        return len(read_shards(self.read))

    def run_task(self, rank: int, progress: Progress) -> None:
        """Count the lines of shard `rank`."""
        counts: Counter[int] = Counter()
        source = ""
        for _, document in read_shard(read_shards(self.read)[rank]):
            source = document.source
            if document.kind == "prose" and self.settings.boilerplate_documents:
                lines = {line.strip() for line in document.text.replace("\r", "\n").split("\n")}
                counts.update(line_key(line) for line in lines if line)
            progress.add(len(document.text))
        pairs = np.array(sorted((k, n) for k, n in counts.items() if n > 1), dtype=LINE)
        write_array(self.folder / f"{rank:05d}.{source}.lines.npy", pairs)

    def finish(self) -> None:
        """Write the frequent lines of each source."""
        by_source: dict[str, list[Path]] = {}
        for path in sorted(self.folder.glob("*.lines.npy")):
            by_source.setdefault(path.name.split(".")[1], []).append(path)
        for source, paths in by_source.items():
            total = np.empty(0, LINE)
            for path in paths:
                total = add_lines(total, np.load(path))
            frequent = total["key"][total["documents"] >= self.settings.boilerplate_documents]
            write_array(frequent_path(self.folder, source), frequent)


def frequent_path(folder: Path, source: str) -> Path:
    """The file with the hashes of the frequent lines of `source`."""
    return folder / f"{source}.frequent.npy"


def add_lines(total: np.ndarray, more: np.ndarray) -> np.ndarray:
    """The sum of two line counts, sorted by key."""
    pairs = np.concatenate([total, more])
    keys, where = np.unique(pairs["key"], return_inverse=True)
    result = np.empty(len(keys), LINE)
    result["key"] = keys
    result["documents"] = np.bincount(where, weights=pairs["documents"], minlength=len(keys))
    return result


@dataclass
class NormalizeStep(Step):
    """One task per shard of the read step, which writes the shard of the same number."""

    settings: NormalizeConfig
    read: Path
    lines: Path | None
    examples: int = 3

    def tasks(self) -> int:
        """One per shard."""
        return len(read_shards(self.read))

    def run_task(self, rank: int, progress: Progress) -> None:
        """Clean the documents of shard `rank`."""
        normalizer, tally = Normalizer(self.settings), Tally(self.examples)
        frequent: set[int] | None = None
        with ShardWriter(self.folder / f"{rank:05d}{SHARD_SUFFIX}") as writer:
            for _, document in read_shard(read_shards(self.read)[rank]):
                if frequent is None:
                    frequent = self._frequent_lines(document.source)
                before = len(document.text.encode())
                text, repairs = normalizer.normalize(document.text, kind=document.kind, frequent=frequent)
                for repair in repairs:
                    tally.note(f"repaired: {repair}", document.source, before)
                    tally.example(f"repaired: {repair}", document.id, text)
                progress.add(before)
                if not text.strip():
                    tally.count(document.source, before, "nothing_left")
                    tally.example("nothing_left", document.id, document.text)
                    continue
                tally.count(document.source, before)
                document.text = text
                if document.language == "auto":
                    language, probability = identify(text)
                    document.language = language if probability >= 0.5 else "und"
                document.dataset = dataset_name(document.dataset, document.source, document.group, document.language)
                writer.write(document)
            tally.bytes_out = writer.text_bytes
        tally.save(self.folder, rank)

    def finish(self) -> None:
        """Write the summary of the corpus."""
        Corpus(self.folder).summarize()

    def _frequent_lines(self, source: str) -> set[int]:
        path = self.lines and frequent_path(self.lines, source)
        return set(np.load(path).tolist()) if path and path.exists() else set()


def dataset_name(template: str, source: str, group: str, language: str) -> str:
    """The name of the .bin/.idx pair that a document is written to, safe as a file name.

    A long name is cut and ends with its hash. A name that would clash with another file of the corpus gets a "_".
    """
    name = template.format(source=source, group=group, language=language or "und")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip(".") or "und"
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}_{xxhash.xxh3_64_intdigest(name.encode()):016x}"[:LONGEST_NAME]
    return f"{name}_" if name in OTHER_FILES or name.endswith(".validation") else name
