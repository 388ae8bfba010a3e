"""Seconds from the command to the first training step, by part, and what the short commands take.

    python -m benchmarks.start
    python -m benchmarks.start --turns 2 -- experiment=smoke data=random        other overrides

Every process has one thread. First table: `mlite train` in fresh processes, in an empty folder. The first run has to write the corpus; the
later ones find it, and their column is the median.

    Python          from the command to the first line of ours
    torch           `import torch`
    config          our config classes are imported, YAML and overrides composed and checked
    other imports   the rest of what a training needs
    checks          run directory, lock, checkpoints
    data            the corpus is written, or found
    model           tokenizer, blend, model, optimizer
    first batch     trackers are started, the loader's first step
    first step      until its loss is known

Second table: whole processes, in turn. Seconds on the wall, of CPU (user and system), and as a multiple of `import torch`'s CPU seconds. A
help text is composed once and kept until a source changes (`megatron_lite/kept_help.py`); the last line is the first time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.summary import heading, markdown

ROOT = Path(__file__).parents[1]
TORCH = "python -c 'import torch'"
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    TORCH: ["-c", "import torch"],
    "mlite --version": ["-m", "megatron_lite", "--version"],
    "mlite train --help": ["-m", "megatron_lite", "train", "--help"],
    "mlite train --help, composed anew": ["-c", "from megatron_lite.commands import train; train.main()", "--help"],
}


COLUMNS = ("command", "wall, s", "CPU, s", "over torch")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the two tables."""
    options = parse(arguments)
    where = heading(threads=1)
    with tempfile.TemporaryDirectory() as folder:
        runs = [parts([*options.overrides, f"run.dir=runs/{i}"], folder) for i in range(options.turns + 1)]
    process(COMMANDS["mlite train --help"])  # from now on it is kept
    commands = [{name: process(words) for name, words in COMMANDS.items()} for _ in range(options.turns)]
    rows = part_rows(runs), command_rows(commands)
    print(where, markdown(("part", "first run, s", "later runs, s"), rows[0]), markdown(COLUMNS, rows[1]), sep="\n\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="of each command; the first run comes before them")
    parser.add_argument("overrides", nargs="*", default=["experiment=smoke"], help="of `mlite train`, after `--`")
    options = parser.parse_args(arguments)
    if options.turns < 1:
        parser.error(f"--turns={options.turns} must be at least 1")
    return options


def parts(overrides: Sequence[str], folder: str) -> dict[str, float]:
    """part -> its seconds, of `mlite train` with `overrides` in `folder`. Raises ValueError with what it printed if it fails."""
    began = time.time()
    done = run(["-m", "benchmarks.start_parts", *overrides], folder)
    if done.returncode:
        raise ValueError(f"mlite train {' '.join(overrides)} failed: {done.stderr.strip()}")
    ends = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"Python"'))
    starts = [began, *ends.values()]
    return {part: end - start for (part, end), start in zip(ends.items(), starts)}


def process(words: Sequence[str]) -> tuple[float, float]:
    """(seconds on the wall, of CPU) of a Python process. Raises ValueError if it fails."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = run(words, ROOT)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise ValueError(f"python {' '.join(words)} failed: {done.stderr.strip()}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run(words: Sequence[str], folder: str | Path) -> subprocess.CompletedProcess[str]:
    """Python with `words` in `folder`, one thread, this checkout's packages."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def part_rows(runs: Sequence[dict[str, float]]) -> list[list[str]]:
    """The lines of the first table."""
    first, *later = [{**run, "whole": sum(run.values())} for run in runs]
    return [[part, f"{first[part]:.2f}", f"{statistics.median(run[part] for run in later):.2f}"] for part in first]


def command_rows(turns: Sequence[dict[str, tuple[float, float]]]) -> list[list[str]]:
    """The lines of the second table."""
    rows = []
    for name in COMMANDS:
        wall, cpu = (statistics.median(turn[name][i] for turn in turns) for i in range(2))
        ratio = statistics.median(turn[name][1] / turn[TORCH][1] for turn in turns)
        rows.append([f"`{name}`", f"{wall:.2f}", f"{cpu:.2f}", f"{ratio:.2f}"])
    return rows


if __name__ == "__main__":
    main()
