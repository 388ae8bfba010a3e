"""status.json of a run directory: what a launcher reads to decide whether to start the run again."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from megatron_lite.atomic import whole_file
from megatron_lite.background import Background, Lost

STATES = ("running", "preempted", "finished", "failed")
PATIENCE_SECONDS = 20.0  # for a file system that is slow at the end of a job


class Status:
    """Writes {state, step, reason} atomically, behind the training; on every rank but the main one it only remembers.

    lost: what else this job has lost of its observers, which the file names too.
    """

    def __init__(self, run_dir: Path, *, main_process: bool, lost: Lost | None = None) -> None:
        self.path, self.main_process = run_dir / "status.json", main_process
        self.state = "running"
        self.lost = lost or Lost()
        self._content: dict[str, Any] = {}
        self._background = Background("status.json", on_loss=self.lost)

    def write(self, state: str, step: int, reason: str, **more: Any) -> None:
        """`state` is one of STATES; `reason` says in words why (empty while running); `more` is written as it is."""
        assert state in STATES
        self.state = state
        self._content = {"state": state, "step": step, "reason": reason, **more}
        self._write_behind()

    def finish(self) -> None:
        """Wait until the file is written, for a while; nothing can be written afterwards."""
        if self.lost.reasons and self._content:
            self._write_behind()
        self._background.finish(time.monotonic() + PATIENCE_SECONDS)

    def _write_behind(self) -> None:
        if self.main_process:
            lost = {"lost": list(self.lost.reasons)} if self.lost.reasons else {}
            self._background.call(partial(self._write, self._content | lost))

    def _write(self, content: dict[str, Any]) -> None:
        with whole_file(self.path) as temporary:
            temporary.write_text(json.dumps(content) + "\n")
