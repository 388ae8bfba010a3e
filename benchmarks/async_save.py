"""How long a step waits for a checkpoint whose disk is slow: saved in the foreground, and in the background.

    python -m benchmarks.async_save

Trains `nemotron4_tiny` on random tokens and saves three times to a disk that is slowed to about five seconds a checkpoint. Prints the
median and the longest step of both ways; the number to look at is longest / median, within one run on one machine.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_lite.checkpoint.store import CheckpointConfig, CheckpointStore
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.training.build import build_engine
from megatron_lite.training.config import compose_run

SAVE_SECONDS, STEPS, EVERY = 5.0, 24, 8
STATE: dict[str, Any] = {
    "consumed_samples": 0, "counters": {"adam_step": 0}, "config": {}, "tokenizer": "", "schedule": {}, "data": {}, "rng": {},
}  # fmt: skip


class SlowFile:
    """A file whose every write takes its share of SAVE_SECONDS."""

    def __init__(self, path: Path, seconds_per_byte: float) -> None:
        self.file: BinaryIO = path.open("wb")
        self.seconds_per_byte = seconds_per_byte

    def write(self, data: Any) -> int:
        time.sleep(memoryview(data).nbytes * self.seconds_per_byte)
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> SlowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def step_times(*, background: bool) -> list[float]:
    """Seconds of each step, its save included."""
    run = compose_run(["experiment=smoke"])
    engine = build_engine(run, Mesh())
    size = sum(piece.local.nbytes for piece in engine.state().tensors.values())
    tokens = torch.randint(0, run.model.vocab_size, (1, 257))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": torch.ones(1, 256, dtype=torch.bool)}
    times = []
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(
            folder,
            CheckpointConfig(async_save=background),
            open_stream=lambda path: SlowFile(Path(path), SAVE_SECONDS / size),  # type: ignore[arg-type,return-value]
        )
        for step in range(1, STEPS + 1):
            began = time.perf_counter()
            engine.train_step([batch] * 12, lr=1e-4)
            if step % EVERY == 0:
                store.save(step, engine.state().tensors, STATE)
            times.append(time.perf_counter() - began)
        store.wait()
    return times[1:]  # the first step warms up


def main() -> None:
    """Print the table."""
    print(f"{'save':12} {'median step s':>14} {'longest step s':>15} {'longest/median':>15}")
    for background in (False, True):
        times = step_times(background=background)
        median, longest = statistics.median(times), max(times)
        name = "background" if background else "foreground"
        print(f"{name:12} {median:14.3f} {longest:15.3f} {longest / median:15.2f}")


if __name__ == "__main__":
    main()
