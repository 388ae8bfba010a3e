"""TensorBoard: the one file that imports `torch.utils.tensorboard`, and only when it is chosen.

Notable:
  - event files go to `run_dir/tensorboard`; `tensorboard --logdir runs` compares all runs;
  - every row is flushed, so that a killed run loses none that the resumed one will not write again;
  - a resumed run tells TensorBoard to forget what an earlier job logged past the checkpoint (`purge_step`).
"""

from __future__ import annotations

import json
from typing import Any

from megatron_lite.tracking.base import Row, RunInfo, flatten


class TensorBoardTracker:
    """Writes scalars: training keys as they are, validation as `val_loss/<source>`. Values are rounded to fp32."""

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = run.start_step + 1 if run.start_step else 0  # without a checkpoint a validation of step 0 goes too
        self._writer = SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=purge_step)
        facts = {"model": run.model, "parameters": run.parameters, "layout": run.layout, "config": run.config}
        text = json.dumps(facts, indent=2, ensure_ascii=False, default=str)
        self._writer.add_text("run", "".join(f"    {line}\n" for line in text.split("\n")), run.start_step)
        self._writer.flush()

    def log(self, row: Row) -> None:
        for key, value in flatten(row).items():
            if key != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, row["step"])
            elif isinstance(value, str):
                self._writer.add_text(key, value, row["step"])
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.close()
