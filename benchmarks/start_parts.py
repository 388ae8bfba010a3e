"""`mlite train` up to its first step, which prints when each part of its start was over. For `benchmarks/start.py`.

    python -m benchmarks.start_parts experiment=smoke run.dir=...

Prints one line, {part: seconds since the epoch at its end}, and ends the process when the first step is done.
"""

from __future__ import annotations

import gc
import json
import os
import time
from typing import Any
from unittest.mock import patch

# phase that the watchdog hears of -> the part that is over when it begins
BEGINS = {"prepare data": "checks", "build": "data", "data": "model", "train_step": "first batch"}


def main() -> None:
    """Train one step."""
    ends = {"Python": time.time()}
    gc.disable()  # as `megatron_lite.cli` does while a command is imported
    import torch  # noqa: F401

    ends["torch"] = time.time()
    import sys

    from megatron_lite.training.config import compose_run

    run = compose_run(sys.argv[1:])
    ends["config"] = time.time()
    from megatron_lite.commands.train import train
    from megatron_lite.training.watchdog import Watchdog

    gc.freeze()
    gc.enable()
    ends["other imports"] = time.time()

    def enter(watchdog: Any, phase: str, step: int) -> None:
        if "first batch" in ends:
            ends["first step"] = time.time()
            os.write(1, f"\n{json.dumps(ends)}\n".encode())  # past `sys.stdout`, which a thread of the command writes
            os._exit(0)  # at once: the command would save, validate and draw
        if phase in BEGINS:
            ends[BEGINS[phase]] = time.time()

    with patch.object(Watchdog, "enter", enter):
        train(run)


if __name__ == "__main__":
    main()
