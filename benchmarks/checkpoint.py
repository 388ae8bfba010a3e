"""What a checkpoint costs the training loop: seconds that it is blocked, seconds until the file is safe, MB/s.

    python -m benchmarks.checkpoint                       a model of 20 million parameters, the disk as it is
    python -m benchmarks.checkpoint --disk-seconds 5      a disk that needs five seconds for each checkpoint
    python -m benchmarks.checkpoint --size tiny

Trains on random tokens in one process and saves every few steps, in each of these ways:

    foreground   checkpoint.async_save=false
    background   checkpoint.async_save=true
    torch.save   the same tensors in one file, synced; nothing is hashed and nothing is made atomic

    blocked      seconds in which the loop waits for a save
    whole        seconds from the call to the complete checkpoint on the disk, while the loop goes on
    MB/s         of weights and both moments, by `whole`
    of plain     `whole` of torch.save / `whole`
    step         the median step while a save is in flight / the median of the others
    longest      the longest step, its save included / the median of all steps
    load         seconds to read it back and, but for torch.save, to verify it

Everything is the median over the saves. The first save is not counted: it allocates what later ones use again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from benchmarks.summary import count, heading, markdown
from megatron_lite.checkpoint.store import CheckpointConfig, CheckpointStore
from megatron_lite.engine.base import Engine
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.training.build import build_engine
from megatron_lite.training.config import compose_run

SIZES = {  # overrides of the smoke run, tokens of a step
    "tiny": (["model.num_layers=1", "model.hidden_size=64", "model.mlp.ffn_size=128", "model.vocab_size=256"], 64),
    "20m": (["model.num_layers=6", "model.hidden_size=512", "model.mlp.ffn_size=2048", "model.vocab_size=4096"], 256),
}
STATE: dict[str, Any] = {
    "consumed_samples": 0, "counters": {"adam_step": 0}, "config": {}, "tokenizer": "", "schedule": {}, "data": {}, "rng": {},
}  # fmt: skip


class SlowFile:
    """A file whose every write takes its share of the seconds that a whole checkpoint is to take."""

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


class Stored:
    """Saves as a run does. background: `checkpoint.async_save`."""

    def __init__(self, folder: Path, engine: Engine, open_stream: Callable[[Path], Any], *, background: bool) -> None:
        self.engine = engine
        self.store = CheckpointStore(folder, CheckpointConfig(async_save=background), open_stream=open_stream)

    def save(self, step: int) -> None:
        self.store.save(step, self.engine.state().tensors, STATE)

    def is_whole(self, step: int) -> bool:
        return self.store.path(step).exists()

    def close(self) -> None:
        self.store.wait()

    def load(self, step: int) -> None:
        self.store.load(step, self.engine.state().tensors)


class TorchSaved:
    """The plain form: one file by torch.save, synced."""

    def __init__(self, folder: Path, engine: Engine, open_stream: Callable[[Path], Any]) -> None:
        self.folder, self.engine, self.open_stream = folder, engine, open_stream
        folder.mkdir()

    def save(self, step: int) -> None:
        tensors = {name: piece.tensor() for name, piece in self.engine.state().tensors.items()}
        with self.open_stream(self.folder / f"{step}.pt") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())

    def is_whole(self, step: int) -> bool:
        return True

    def close(self) -> None:
        """Nothing is in flight."""

    def load(self, step: int) -> None:
        found = torch.load(self.folder / f"{step}.pt", weights_only=True)
        for name, piece in self.engine.state().tensors.items():
            piece.tensor().copy_(found[name])


@dataclass
class Times:
    """Seconds: of each save, and of each step with and without one in flight; a step's save is a part of it."""

    blocked: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    longest: float = 0.0
    load: float = 0.0

    def add(self, blocked: float, whole: float, *, beside: list[float], alone: list[float]) -> None:
        """A save, and the steps after it, in their order: those beside it, then those alone."""
        first, *others = [*beside, *alone]
        self.blocked.append(blocked)
        self.whole.append(whole)
        self.beside += beside
        self.alone += alone
        self.longest = max(self.longest, blocked + first, *others)

    @property
    def median_step(self) -> float:
        """Of all steps, saves not included."""
        return statistics.median([*self.alone, *self.beside])


def measured(way: Stored | TorchSaved, step: Callable[[], None], *, saves: int, steps: int) -> Times:
    """A loop that saves `saves` times, and after each goes on until it is whole and `steps` steps more."""
    times = Times()
    for number in range(1, saves + 2):
        began = time.perf_counter()
        way.save(number)
        blocked = time.perf_counter() - began
        whole = blocked if way.is_whole(number) else None
        beside: list[float] = []
        alone: list[float] = []
        while whole is None or len(alone) < steps:
            before = time.perf_counter()
            step()
            now = time.perf_counter()
            (beside if whole is None else alone).append(now - before)
            if whole is None and way.is_whole(number):
                whole = now - began
        if number > 1:
            times.add(blocked, whole, beside=beside, alone=alone)
    way.close()
    began = time.perf_counter()
    way.load(saves + 1)
    times.load = time.perf_counter() - began
    return times


COLUMNS = ("save", "blocked, s", "whole, s", "MB/s", "of plain", "step", "longest", "load, s")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    overrides, length = SIZES[options.size]
    where = heading(threads=options.threads)
    run = compose_run(["experiment=smoke", *overrides])
    engine = build_engine(run, Mesh())
    megabytes = sum(piece.local.nbytes for piece in engine.state().tensors.values()) / 1e6
    tokens = torch.randint(0, run.model.vocab_size, (1, length + 1))
    mask = torch.ones(1, length, dtype=torch.bool)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": mask}

    def step() -> None:
        engine.train_step([batch], lr=1e-5)

    def open_stream(path: Path) -> Any:
        path = Path(path)
        return SlowFile(path, options.disk_seconds / megabytes / 1e6) if options.disk_seconds else path.open("wb")

    ways: dict[str, Callable[[Path], Stored | TorchSaved]] = {
        "foreground": lambda folder: Stored(folder, engine, open_stream, background=False),
        "background": lambda folder: Stored(folder, engine, open_stream, background=True),
        "torch.save": partial(TorchSaved, engine=engine, open_stream=open_stream),
    }
    step()
    found = {}
    for name, make in ways.items():
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found[name] = measured(make(Path(folder) / "saved"), step, saves=options.saves, steps=options.steps)
    plain = statistics.median(found["torch.save"].whole)
    rows = [row(name, times, megabytes=megabytes, plain=plain) for name, times in found.items()]
    print(where, f"{megabytes:,.0f} MB in a checkpoint", markdown(COLUMNS, rows), sep="\n\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="20m")
    parser.add_argument("--saves", type=count, default=5)
    parser.add_argument("--steps", type=count, default=8, help="after each save is whole")
    parser.add_argument("--disk-seconds", type=float, default=0.0, help="what a checkpoint's writes wait; default: not")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: the one for temporary files")
    parser.add_argument("--threads", type=count, default=1)
    options = parser.parse_args(arguments)
    if not 0 <= options.disk_seconds < 3600:
        parser.error(f"--disk-seconds={options.disk_seconds} must be between 0 and 3600")
    return options


def row(name: str, times: Times, *, megabytes: float, plain: float) -> list[str]:
    """A line of the table."""
    blocked, whole = statistics.median(times.blocked), statistics.median(times.whole)
    slower = statistics.median(times.beside) / statistics.median(times.alone) if times.beside and times.alone else None
    return [
        name,
        f"{blocked:.3f}",
        f"{whole:.3f}",
        f"{megabytes / whole:,.0f}",
        f"{plain / whole:.2f}",
        f"{slower:.2f}" if slower else "",
        f"{times.longest / times.median_step:.2f}",
        f"{times.load:.3f}",
    ]


if __name__ == "__main__":
    main()
