"""Kill a training run at many random moments, resume it each time, and hold it against one that nobody disturbed.

    python -m tests.soak --kills 100 --seed 0

Every job is a process of its own (a fork, see `tests.forked`), so that a kill costs a fraction of a second instead of a start of
Python. Checkpoints are written slowly, so that many kills fall into a save; some jobs save in the background
(`checkpoint.async_save`), some do not. A kill (SIGKILL) comes at one of these moments, drawn by `--seed`:
    anywhere    some time after the start: reading data, building the model, restoring, training
    row         some time after the next row of metrics.jsonl
    save        some time after a save began
A round ends after some kills, or when the run finishes before its kill; the next one begins with an empty directory. Held after every
kill: the newest whole checkpoint is not older than it was, and the run had not gone further beyond it than it may. Held at the end of
every round: loss, gradient norm and learning rate of every step to the last digit, and the SHA-256 of weights and optimizer.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import runs
from tests.forked import PROCESSES

STEPS, EVERY = 40, 3
OVERRIDES = [f"train.max_steps={STEPS}", f"checkpoint.every={EVERY}", "checkpoint.keep=2", "train.eval_every=15"]
MOMENTS = ("anywhere", "row", "save", "save")
DEADLINE = 120.0  # seconds that a job may take at most before it counts as hanging


class SlowFile:
    """A file whose every write takes a while."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.raw: Any = open(path, "wb")  # noqa: SIM115
        self.seconds = seconds

    def write(self, data: Any) -> int:
        time.sleep(self.seconds)
        return self.raw.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def __enter__(self) -> SlowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()


def job(data: Path, run_dir: Path, log: Path, slowness: float, overrides: list[str]) -> None:
    """In a process of its own: one start of the run, its output in `log`; each write of a checkpoint takes `slowness` seconds more."""
    from megatron_lite.checkpoint.store import CheckpointStore
    from megatron_lite.commands import train

    class SlowStore(CheckpointStore):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, open_stream=lambda path: SlowFile(path, slowness))

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    train.CheckpointStore = SlowStore  # type: ignore[misc]
    sys.argv = ["train", *runs.arguments(data, run_dir, *OVERRIDES, *overrides)]
    train.main()


@dataclass
class Summary:
    """What the soak has seen."""

    kills: int = 0
    rounds: int = 0
    at: collections.Counter[str] = field(default_factory=collections.Counter)
    in_a_save: int = 0
    lost: list[int] = field(default_factory=list)  # steps that each kill cost
    seconds: float = 0.0

    def text(self) -> str:
        """For a person."""
        moments = ", ".join(f"{count} {name}" for name, count in sorted(self.at.items()))
        return (
            f"{self.kills} kills ({moments}; {self.in_a_save} left a save unfinished) in {self.rounds} rounds of {STEPS} steps, "
            f"{self.seconds:.0f} s ({self.seconds / max(self.kills, 1):.2f} s a kill)\n"
            f"steps lost by a kill: {sum(self.lost) / max(len(self.lost), 1):.1f} on average, {max(self.lost, default=0)} at most "
            f"(checkpoint.every={EVERY}, twice that with a save in the background)\n"
            "losses, gradient norms, learning rates and the SHA-256 of weights and optimizer: bitwise equal to the run without a kill"
        )


class Soak:
    """One soak in `folder`. `check` raises AssertionError with what differs."""

    def __init__(self, folder: Path, *, data: Path, seed: int, say: Callable[[str], None] = print) -> None:
        self.folder, self.data, self.say = folder, data, say
        self.draw = random.Random(seed)
        self.run_dir, self.log, self.straight = folder / "run", folder / "job.log", folder / "straight"
        self.summary = Summary()

    def run(self, kills: int) -> Summary:
        """Kill `kills` times, over as many rounds as it takes, and finish the last one."""
        began = time.monotonic()
        self._finish(self.straight, [], slowness=0.0)
        while self.summary.kills < kills:
            self._round(kills)
        self.summary.seconds = time.monotonic() - began
        return self.summary

    def _round(self, kills: int) -> None:
        """One run from its first step to its last, killed until it is done or the kills are used up."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
        kills = min(kills, self.summary.kills + self.draw.randint(3, 12))
        newest, finished = 0, False
        while not finished and self.summary.kills < kills:
            behind = self.draw.random() < 0.5
            untouched = self._rows_stamp()
            finished = self._start_and_kill([f"checkpoint.async_save={str(behind).lower()}"])
            if not finished:
                # killed before it went back and trained, a job has lost nothing: the rows are still those of the one before
                began = self._rows_stamp() != untouched
                newest = self._check_kill(newest, may_lose=(2 * EVERY if behind else EVERY) if began else 2 * EVERY)
        self._finish(self.run_dir, [], slowness=0.0)
        self._check_round()
        self.summary.rounds += 1
        self.say(f"round {self.summary.rounds}: {self.summary.kills} kills so far, equal")

    def _rows_stamp(self) -> tuple[int, int] | None:
        """Changes whenever a job rewrites or extends metrics.jsonl."""
        rows = self.run_dir / "metrics.jsonl"
        return (rows.stat().st_size, rows.stat().st_mtime_ns) if rows.exists() else None

    def _start_and_kill(self, overrides: list[str]) -> bool:
        """One job; True when it had finished before its kill came."""
        moment, slowness = self.draw.choice(MOMENTS), self.draw.choice([0.0, 0.003, 0.01])
        left = self._saves()  # of saves that earlier kills cut off; the next save clears them away
        arrived = {"anywhere": lambda: True, "row": self._rows_after(), "save": lambda: bool(self._saves() - left)}[
            moment
        ]
        process = self._started(self.run_dir, overrides, slowness)
        span = {"anywhere": 1.5, "row": 0.3, "save": 0.25}[moment]
        deadline = time.monotonic() + DEADLINE
        while process.is_alive() and not arrived():
            assert time.monotonic() < deadline, f"the job hangs: {self.log.read_text()}"
            time.sleep(0.002)
        process.join(self.draw.uniform(0, span))
        process.kill()
        process.join()
        if process.exitcode == 0:
            return True
        assert process.exitcode == -9, f"the job ended by itself with {process.exitcode}: {self.log.read_text()}"
        self.summary.kills += 1
        self.summary.at[moment] += 1
        self.summary.in_a_save += bool(self._saves() - left)
        return False

    def _check_kill(self, before: int, *, may_lose: int) -> int:
        """The newest whole checkpoint's step, having checked that the kill took neither it nor too many steps."""
        newest = newest_whole(self.run_dir)
        reached = max(last_step(self.run_dir), newest)
        assert newest >= before, (
            f"the checkpoint of step {before} was whole before the kill, the newest one now is {newest}"
        )
        assert reached - newest <= may_lose, (
            f"a kill at step {reached} goes back to {newest}: more than {may_lose} steps"
        )
        self.summary.lost.append(reached - newest)
        return newest

    def _check_round(self) -> None:
        assert runs.curve(self.run_dir) == runs.curve(self.straight), "losses, gradient norms or learning rates differ"
        last = f"checkpoints/step_{STEPS:08d}"
        assert runs.digest(self.run_dir / last) == runs.digest(self.straight / last), "weights or optimizer differ"
        assert runs.status(self.run_dir)["state"] == "finished"
        assert not list((self.run_dir / "checkpoints").glob(".tmp-*")), "something of an unfinished save is left"

    def _finish(self, run_dir: Path, overrides: list[str], *, slowness: float) -> None:
        process = self._started(run_dir, overrides, slowness)
        process.join(DEADLINE)
        assert process.exitcode == 0, f"the job ended with {process.exitcode}: {self.log.read_text()}"

    def _started(self, run_dir: Path, overrides: list[str], slowness: float) -> Any:
        process = PROCESSES.Process(target=job, args=(self.data, run_dir, self.log, slowness, overrides), daemon=True)
        process.start()
        return process

    def _saves(self) -> set[tuple[str, int]]:
        """Saves that are under way, or were when their job was killed: name and inode."""
        found = set()
        for path in (self.run_dir / "checkpoints").glob(".tmp-step_*"):
            with contextlib.suppress(FileNotFoundError):  # done in this very moment
                found.add((path.name, path.stat().st_ino))
        return found

    def _rows_after(self) -> Callable[[], bool]:
        """Whether the metrics have grown since now."""
        metrics = self.run_dir / "metrics.jsonl"
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        return lambda: metrics.exists() and metrics.stat().st_mtime_ns > before and metrics.stat().st_size > 0


def newest_whole(run_dir: Path) -> int:
    """The step to which a resume would go back, 0 when to the start."""
    from megatron_lite.checkpoint.manifest import step_of
    from megatron_lite.checkpoint.opening import find_checkpoint

    try:
        return step_of(find_checkpoint(run_dir).name) or 0
    except ValueError:
        return 0


def last_step(run_dir: Path) -> int:
    """The last step of which a whole row was written."""
    from megatron_lite.tracking import read_rows

    return max((row["step"] for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row), default=0)


def main() -> int:
    """Exit code 0 when every round ended equal."""
    parser = argparse.ArgumentParser(
        description="Kill a tiny run many times and compare it with one that nobody disturbed."
    )
    parser.add_argument("--kills", type=int, default=100, help="how many times (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="draws the moments (default 0)")
    parser.add_argument("--keep", action="store_true", help="leave the directory of the runs behind")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        data = runs.make_data(folder / "data")
        soak = Soak(folder, data=data, seed=given.seed)
        print(soak.run(given.kills).text())
        return 0
    except AssertionError as error:
        print(f"not equal: {error}\nthe runs lie in {folder}", file=sys.stderr)
        given.keep = True
        return 1
    finally:
        if not given.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
