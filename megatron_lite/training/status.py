"""status.json of a run directory: what a launcher reads to decide whether to start the run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_lite.atomic import whole_file

STATES = ("running", "preempted", "finished", "failed")


class Status:
    """Writes {state, step, reason} atomically; on every rank but the main one it only remembers."""

    def __init__(self, run_dir: Path, *, main_process: bool) -> None:
        self.path, self.main_process = run_dir / "status.json", main_process
        self.state = "running"

    def write(self, state: str, step: int, reason: str, **more: Any) -> None:
        """`state` is one of STATES; `reason` says in words why (empty while running); `more` is written as it is."""
        assert state in STATES
        self.state = state
        if not self.main_process:
            return
        with whole_file(self.path) as temporary:
            temporary.write_text(json.dumps({"state": state, "step": step, "reason": reason, **more}) + "\n")
