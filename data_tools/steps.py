"""The unit of work that an executor runs: a step, divided into independent tasks.

A step is a small picklable object: settings, folders of the steps that it reads, its own folder. `tasks()` can be called once those
are finished; `run_task(rank)` writes files into `folder`, each atomically, so that a repeated task gives the same bytes.
"""

from __future__ import annotations

import heapq
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from data_tools.documents import stats_path
from megatron_lite.atomic import write_json

FORMAT = 3  # raise it when the code of a stage changes what it writes; finished work of older code is then redone
EXAMPLE_CHARS = 300


@dataclass
class Step:
    """One step of the pipeline; subclasses add `run_task` and say how many tasks there are."""

    name: str
    folder: Path
    settings: Any

    def tasks(self) -> int:
        """How many tasks this step has (callable once the steps before it are finished)."""
        return 1

    def run_task(self, rank: int, progress: Progress) -> None:
        """Do task `rank`, write its files into `self.folder`."""
        raise NotImplementedError

    def finish(self) -> None:
        """Combine what all tasks wrote; the command calls it once, after the last task."""


class Progress:
    """Reports how far a task is through a small file, which works across processes and nodes."""

    def __init__(self, path: Path | None, every_seconds: float = 0.5) -> None:
        self.path = path
        self.every = every_seconds
        self.bytes = 0
        self._next = 0.0

    def add(self, text_bytes: int) -> None:
        """Count bytes of text as processed."""
        self.bytes += text_bytes
        now = time.monotonic()
        if self.path is not None and now >= self._next:
            self._next = now + self.every
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(str(self.bytes))


@dataclass
class Tally:
    """Counts of one task by reason and source, with a few examples that do not depend on the order of work.

    Examples are the texts with the smallest hashes: spread over the data, and the same on every run.
    """

    examples_kept: int = 3
    documents_in: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    by_reason: dict[str, dict[str, list[int]]] = field(default_factory=lambda: defaultdict(dict))
    kept: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    examples: dict[str, list[tuple[int, str, str]]] = field(default_factory=lambda: defaultdict(list))

    def count(self, source: str, text_bytes: int, reason: str | None = None) -> None:
        """One document of `source` was read; it was kept (`reason` None) or dropped for `reason`."""
        self.documents_in += 1
        self.bytes_in += text_bytes
        if reason is None:
            self.documents_out += 1
            self.bytes_out += text_bytes
            cell = self.kept[source]
        else:
            cell = self.by_reason[reason].setdefault(source, [0, 0])
        cell[0] += 1
        cell[1] += text_bytes

    def note(self, reason: str, source: str, text_bytes: int) -> None:
        """An event that drops nothing (such as a repair), counted beside the reasons."""
        cell = self.by_reason[reason].setdefault(source, [0, 0])
        cell[0] += 1
        cell[1] += text_bytes

    def example(self, label: str, identity: str, text: str) -> None:
        """Keep `text` as an example of `label` ("kept" or a reason) if its hash is among the smallest."""
        entry = (-xxhash.xxh3_64_intdigest(identity.encode()), identity, text[:EXAMPLE_CHARS])
        heap = self.examples[label]
        if len(heap) < self.examples_kept:
            heapq.heappush(heap, entry)
        elif heap and entry > heap[0]:
            heapq.heapreplace(heap, entry)

    def save(self, folder: Path, rank: int, **more: Any) -> None:
        """Write the counts as this task's stats file."""
        examples = {
            label: [{"id": i, "text": t} for _, i, t in sorted(heap, reverse=True)]
            for label, heap in sorted(self.examples.items())
        }
        value = {
            "documents_in": self.documents_in,
            "documents_out": self.documents_out,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "kept": dict(sorted(self.kept.items())),
            "reasons": {k: dict(sorted(v.items())) for k, v in sorted(self.by_reason.items())},
            "examples": examples,
        }
        write_json(stats_path(folder, rank), value | more)


def fingerprint(settings: Any, *parents: str) -> str:
    """Eight hexadecimal digits that identify a step's settings and all steps before it."""
    text = json.dumps([FORMAT, settings, parents], sort_keys=True, default=str)
    return f"{xxhash.xxh3_64_intdigest(text.encode()):016x}"[:8]
