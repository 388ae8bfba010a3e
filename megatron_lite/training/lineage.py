"""Which checkpoint was led to by which `resume=<path>`, so that the same command goes on where its last job stopped.

A manifest's `lineage` lists the times that its run was taken back or branched off with `resume=<path>`, oldest first. A checkpoint
descends from a path if one of these entries is of that path: it was named like that, or it was the same checkpoint under another
path. So the first job of a command goes to the path and drops what comes after it, and every later one goes on from what it left,
even when the checkpoint at the path is gone by then. `resume_again=<word>` is the same with a word to it: a word that is not in the
lineage yet goes back once more.
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
    """What `resume=<path>` names. path: absolute. checkpoint: its identity, None where the path is a run's or leads nowhere."""

    path: str
    checkpoint: str | None
    word: str = ONCE

    @classmethod
    def named(cls, path: str, word: str) -> Origin:
        """Reads the manifest at `path`, if there is one; damage is found where it is loaded."""
        checkpoint = None
        if (Path(path) / MANIFEST).exists():
            with suppress(CheckpointError):
                checkpoint = identity(read_manifest(path))
        return cls(str(Path(path).resolve()), checkpoint, word.lower())

    def entry(self, step: int) -> dict[str, Any]:
        """The entry of a lineage: from here on a run was led by this path, to the checkpoint of `step`."""
        return {"path": self.path, "checkpoint": self.checkpoint, "word": self.word, "step": step}

    def is_in(self, lineage: list[dict[str, Any]]) -> bool:
        """Whether a run with this lineage descends from here, by this word; without one, by any."""
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
