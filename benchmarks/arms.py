"""Arms of a comparison: the same training run with different settings, over several seeds.

    study = Study(Path("runs/fp8"), common=["model=nano2_tiny", "train.max_tokens=300000"], jobs=2)
    results = study.run([Arm("fp32"), Arm("bf16", ("precision=bf16",))], seeds=[0, 1, 2])
    results["bf16"][0].last_losses()

`benchmarks/summary.py` makes statistics, a table and a plot of the results. Notable:
  - An arm is a list of overrides of `mlite train`. Its runs are ordinary run directories, `<folder>/<arm>/seed_<seed>`, which every
    command of the project can read. A seed means the same initial weights (where the shapes agree) and the same data order in every arm.
  - A study can be stopped at any time. The same command continues: finished runs are read, unfinished ones resume from their checkpoint.
    A run directory that was made with other settings is refused, and nothing is ever deleted.
  - Each run has one thread, and `jobs` runs train side by side, each in a process of its own; a single job trains in this process.
    With `ranks`, each run is a job of so many processes, which torchrun starts.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from megatron_lite.atomic import whole_file
from megatron_lite.commands.train import train
from megatron_lite.errors import TrainingDivergedError, WorkFailedError, error_text
from megatron_lite.tracking.curves import read_curves
from megatron_lite.tracking.jsonl import METRICS_FILE, read_rows
from megatron_lite.training.config import compose_run

Points = list[tuple[int, float]]  # (tokens trained on, loss)

WIDENINGS = 2  # how often a sweep goes on beyond its values when the best one is an end of them
_ALWAYS = ("tracking=none", "train.threads=1")
_RECORD = "arm.json"  # in a run directory: the settings that it was made with and how it ended
_LOG = "log.txt"  # in a run directory: what the training printed


@dataclass(frozen=True)
class Arm:
    """overrides: of `mlite train`, with `{seed}` standing for the seed (say, in `init_from=runs/teacher/seed_{seed}`)."""

    name: str
    overrides: tuple[str, ...] = ()

    def extended(self, *overrides: str, name: str = "") -> Arm:
        """The arm with more overrides; of two for the same key the later one counts."""
        return replace(self, name=name or self.name, overrides=(*self.overrides, *overrides))


@dataclass(frozen=True)
class Result:
    """A run that has ended. outcome: `finished`, or `diverged: ` and the reason."""

    arm: str
    seed: int
    directory: Path
    outcome: str

    @property
    def diverged(self) -> bool:
        return self.outcome != "finished"

    def training(self, key: str = "loss") -> Points:
        """A finite column of the training rows over the tokens trained on: `loss`, or what else an objective reports."""
        rows = [row for row in self._rows() if key in row and "consumed_tokens" in row]
        return [(row["consumed_tokens"], row[key]) for row in rows if math.isfinite(row[key])]

    def held_out(self, prefix: str = "") -> Points:
        """Held-out loss over tokens: the mean over the sources whose names start with `prefix`, say `english/`.

        Raises ValueError if there is no such source.
        """
        rows = list(self._rows())
        tokens = {row["step"]: row["consumed_tokens"] for row in rows if "consumed_tokens" in row} | {0: 0}
        points = []
        for row in read_curves(rows).validation:
            losses = [loss for name, loss in row["val_loss"].items() if name.startswith(prefix)]
            if not losses:
                raise ValueError(
                    f"no held-out source of {self.directory} starts with {prefix!r}: {sorted(row['val_loss'])}"
                )
            points.append((tokens[row["step"]], statistics.fmean(losses)))
        return points

    def last_losses(self, share: float = 0.1) -> float:
        """The mean of the last `share` of the training losses; NaN for a run that diverged."""
        losses = [loss for _, loss in self.training()]
        return math.nan if self.diverged else statistics.fmean(losses[-max(1, round(share * len(losses))) :])

    def final(self, prefix: str = "") -> float:
        """The last held-out loss; NaN for a run that diverged."""
        return math.nan if self.diverged else self.held_out(prefix)[-1][1]

    def tokens_per_second(self) -> float:
        """The median over the training rows, so that warming up and a busy moment do not count."""
        return statistics.median(speed for _, speed in self.training("tokens_per_second"))

    def _rows(self) -> Iterator[dict[str, Any]]:
        return read_rows(self.directory / METRICS_FILE)


@dataclass(frozen=True)
class Study:
    """Runs arms below `folder`. common: the overrides of every arm. jobs: how many runs train at the same time. ranks: of a run."""

    folder: Path
    common: Sequence[str] = ()
    jobs: int = 1
    ranks: int = 1

    def run(self, arms: Iterable[Arm], seeds: Iterable[int]) -> dict[str, list[Result]]:
        """The results by the arm's name, in the order of `seeds`. What is finished is only read.

        Raises ValueError for a run directory made with other settings, WorkFailedError naming its log for a run that failed
        for another reason than that it diverged, and SystemExit after a signal.
        """
        seeds = list(seeds)
        tasks = {(arm.name, seed): self._words(arm, seed) for arm in arms for seed in seeds}
        open_tasks = {key: words for key, words in tasks.items() if not _outcome(self._directory(*key), words)}
        for (name, seed), seconds in self._train(open_tasks):
            result = self._result(name, seed, tasks[name, seed])
            print(
                f"{name}, seed {seed}: {result.outcome}, loss {result.last_losses():.4f}, {seconds:.0f} s", flush=True
            )
        return {
            name: [self._result(name, seed, tasks[name, seed]) for seed in seeds]
            for name in dict.fromkeys(name for name, _ in tasks)
        }

    def sweep(
        self, arm: Arm, key: str, values: Sequence[float], *, overrides: Sequence[str], seed: int = 0,
        score: Callable[[Result], float],
    ) -> tuple[Arm, dict[float, float]]:  # fmt: skip
        """`arm` with the value of `key` that has the least score in runs with `overrides` (a short length), and all scores.

        Where the best of several `values` is the first or last one, half or twice of it is tried too, at most `WIDENINGS` times. A
        diverged run has no score. Raises WorkFailedError if all diverged.
        """
        values = sorted(values)
        for widenings_left in range(WIDENINGS, -1, -1):
            scores = self._scores(arm, key, values, overrides=overrides, seed=seed, score=score)
            finite = {value: found for value, found in scores.items() if math.isfinite(found)}
            if not finite:
                raise WorkFailedError(f"every run of {arm.name} diverged, with {key} in {values}: try smaller values")
            best = min(finite, key=finite.__getitem__)
            if len(values) == 1 or best not in (values[0], values[-1]):
                break
            if not widenings_left:
                print(f"{arm.name}: {key}={best} is best and an end of {values}; a better one may lie beyond")
                break
            values = [best / 2, *values] if best == values[0] else [*values, best * 2]
        return arm.extended(f"{key}={best}"), scores

    def _scores(
        self, arm: Arm, key: str, values: Sequence[float], *, overrides: Sequence[str], seed: int,
        score: Callable[[Result], float],
    ) -> dict[float, float]:  # fmt: skip
        candidates = {
            value: arm.extended(*overrides, f"{key}={value}", name=f"{arm.name}/{key}_{value}") for value in values
        }
        results = self.run(candidates.values(), [seed])
        return {value: score(results[candidate.name][0]) for value, candidate in candidates.items()}

    def command(self, words: Sequence[str], *, makes: Path) -> Path:
        """Run `mlite <words>` in a process of its own unless `makes` exists, which the command must make as a whole or not at all.

        What it prints is in `<makes>.log`. Raises WorkFailedError naming that file if it fails.
        """
        if not makes.exists():
            path = Path(f"{makes}.log")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as log:
                command = [sys.executable, "-m", "megatron_lite", *words]
                ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
            if ended.returncode or not makes.exists():
                reason = f"exit code {ended.returncode}: {_last_line(path.read_text())}"
                raise WorkFailedError(f"mlite {words[0]} failed ({reason}); what it printed is in {path}")
        return makes

    def _directory(self, name: str, seed: int) -> Path:
        return self.folder / name / f"seed_{seed}"

    def _words(self, arm: Arm, seed: int) -> list[str]:
        words = [word.replace("{seed}", str(seed)) for word in (*_ALWAYS, *self.common, *arm.overrides)]
        return [*words, f"seed={seed}"]

    def _result(self, name: str, seed: int, words: list[str]) -> Result:
        directory = self._directory(name, seed)
        outcome = _outcome(directory, words)
        if outcome is None:
            raise SystemExit(f"{directory} was interrupted; the same command continues")
        return Result(name, seed, directory, outcome)

    def _train(self, tasks: dict[tuple[str, int], list[str]]) -> Iterator[tuple[tuple[str, int], float]]:
        """Train `jobs` at a time; yields each task as it ends, with its seconds."""
        if self.jobs == self.ranks == 1:
            for key, words in tasks.items():
                began = time.monotonic()
                _in_this_process(self._directory(*key), words)
                yield key, time.monotonic() - began
            return
        pool = ThreadPoolExecutor(self.jobs)
        try:
            waiting = {
                pool.submit(_in_a_process, self._directory(*key), words, self.ranks): key
                for key, words in tasks.items()
            }
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def train_arm(directory: Path, words: list[str], ranks: int = 1) -> None:
    """`mlite train <words>` into `directory`; what it prints is in log.txt there, also the traceback of an error.

    Raises what the training raises, unless it diverged.
    """
    record = directory / _RECORD
    with whole_file(record) as temporary:
        temporary.write_text(json.dumps({"overrides": words, "outcome": None}) + "\n")
    outcome = None
    with (directory / _LOG).open("a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            run = [*words, f"run.dir={directory}"]
            train(compose_run(run)) if ranks == 1 else _torchrun(ranks, ["train", *run], log)
            if json.loads((directory / "status.json").read_text())["state"] == "finished":
                outcome = "finished"
        except TrainingDivergedError as error:
            outcome = f"diverged: {error}"
        except Exception:
            traceback.print_exc(file=log)
            raise
    with whole_file(record) as temporary:
        temporary.write_text(json.dumps({"overrides": words, "outcome": outcome}) + "\n")


def _torchrun(ranks: int, words: list[str], log: TextIO) -> None:
    """`mlite <words>` on `ranks` processes of this machine. Raises WorkFailedError if it fails; a run that diverges fails, too."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    ended = subprocess.run([*launcher, "-m", "megatron_lite", *words], stdout=log, stderr=subprocess.STDOUT)
    if ended.returncode:
        raise WorkFailedError(f"torchrun ended with exit code {ended.returncode}")


def _in_this_process(directory: Path, words: list[str]) -> None:
    """`train_arm`. Raises WorkFailedError if it fails."""
    try:
        train_arm(directory, words)
    except Exception as error:
        raise _failed(directory, error_text(error)) from error


def _in_a_process(directory: Path, words: list[str], ranks: int) -> float:
    """`train_arm` in a process of its own; returns its seconds. Raises WorkFailedError if it fails."""
    began = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.arms", str(directory), str(ranks), *words]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise _failed(directory, f"exit code {ended.returncode}: {_last_line(ended.stderr)}")
    return time.monotonic() - began


def _failed(directory: Path, reason: str) -> WorkFailedError:
    return WorkFailedError(f"the run in {directory} failed ({reason}); its log is {directory / _LOG}")


def _last_line(text: str) -> str:
    """The last line of what a process printed: of a traceback the error itself."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it printed nothing")


def _outcome(directory: Path, words: list[str]) -> str | None:
    """How the run in `directory` ended; None if it has not. Raises ValueError if it was made with other settings."""
    path = directory / _RECORD
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    if record["overrides"] != words:
        if not (directory / METRICS_FILE).exists():  # those settings were refused, or never used
            return None
        changed = sorted(set(record["overrides"]) ^ set(words)) or "their order"
        raise ValueError(
            f"{directory} was made with other settings ({changed}); give another --folder, or move it out of the way"
        )
    return record["outcome"]


if __name__ == "__main__":
    train_arm(Path(sys.argv[1]), sys.argv[3:], ranks=int(sys.argv[2]))
