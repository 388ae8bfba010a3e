"""Which checkpoints descend from which `resume=<path>`, so that the same command continues where its last job stopped.

A manifest's `lineage` lists, oldest first, each time that its run went back or branched off with `resume=<path>`. A
checkpoint descends from a path if one of these entries matches it: the same path, or the same checkpoint under another path.
So the first job of a command goes back to the path and drops the later checkpoints, and every later job continues from the
checkpoints of the first, even if the checkpoint at the path has been deleted. `resume_again=<value>` adds a value to the
entry: a value that is not in the lineage yet goes back once more.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.manifest import MANIFEST, identity, read_manifest, step_name
from megatron_lite.errors import CheckpointError

ONCE = "false"  # the word of `resume_again` for the first time


@dataclass(frozen=True)
class Origin:
    """What `resume=<path>` names. path: absolute. checkpoint: its identity; None if the path is a run directory or does not
    exist."""

    path: str
    checkpoint: str | None
    word: str = ONCE

    @classmethod
    def named(cls, path: str, word: str) -> Origin:
        """Read the manifest at `path`, if there is one. Damage is reported later, when the checkpoint is loaded."""
        checkpoint = None
        if (Path(path) / MANIFEST).exists():
            with suppress(CheckpointError):
                checkpoint = identity(read_manifest(path))
        return cls(str(Path(path).resolve()), checkpoint, word.lower())

    def entry(self, step: int) -> dict[str, Any]:
        """The lineage entry that says that a run followed this path to the checkpoint of `step`."""
        return {"path": self.path, "checkpoint": self.checkpoint, "word": self.word, "step": step}

    def is_in(self, lineage: list[dict[str, Any]]) -> bool:
        """Whether a run with this lineage descends from this origin with the given `resume_again` value (None: with any)."""
        return any(
            (entry.get("path") == self.path or (self.checkpoint and entry.get("checkpoint") == self.checkpoint))
            and self.word in (ONCE, entry.get("word"))
            for entry in lineage
        )


def descendants(origin: Origin, directory: Path, steps: list[int]) -> list[int]:
    """Those of the `steps` in `directory` whose checkpoints descend from `origin`; unreadable ones do not."""
    found = []
    for step in steps:
        try:
            lineage = read_manifest(directory / step_name(step))["lineage"]
        except CheckpointError:
            continue
        if origin.is_in(lineage):
            found.append(step)
    return found
