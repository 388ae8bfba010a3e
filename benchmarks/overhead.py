"""What metrics, trackers and the watchdog cost a training step: `mlite train` with each of them beside one without, in turn.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --turns 5 --only wandb watchdog

Every variant is a process (for the watchdog two ranks), which builds its model once. Then all do `--steps` steps in turn, the one without
first. The work is that of benchmarks.train_step, on one thread. A row is logged, and passed to the tracker, at every step, where
`train.log_every` is 10 by default: a tenth of what is shown is what a training pays.

Two ratios, above 1 where it costs something: seconds on the wall, the median of the turns with its quartiles; and seconds of CPU (user and
system) of the process, its threads and its children, over all turns, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.ours import overrides
from benchmarks.peers.serving import Work
from benchmarks.summary import count, heading, markdown
from benchmarks.train_step import ROOT, SIZES, Runner, environment

NEVER = 1_000_000
TICK = os.sysconf("SC_CLK_TCK")
ALONE, TOGETHER = "one process without", "two ranks without"


@dataclass(frozen=True)
class Variant:
    """overrides: of `mlite train`. beside: what it is compared with. ranks: processes, of which the first one is timed."""

    overrides: tuple[str, ...]
    beside: str = ALONE
    ranks: int = 1


_ROWS = ("train.log_every=1",)
_WANDB = ("tracking.wandb.enabled=true", "tracking.wandb.mode=offline")
_SHARE = "train.micro_batch_size=4"
BARE = {
    ALONE: Variant((f"train.log_every={NEVER}",)),
    TOGETHER: Variant((_SHARE, f"train.log_every={NEVER}", "watchdog.timeout_seconds=0"), ranks=2),
}
VARIANTS = {
    "metrics.jsonl": Variant(_ROWS),
    "console": Variant((*_ROWS, "tracking.console=true")),
    "tensorboard": Variant((*_ROWS, "tracking.tensorboard=true")),
    "wandb, offline": Variant((*_ROWS, *_WANDB)),
    "watchdog": Variant((_SHARE, f"train.log_every={NEVER}"), TOGETHER, ranks=2),
}
COLUMNS = ("variant", "wall: median", "quartiles", "CPU", "ms a step, CPU")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table."""
    options = parse(arguments)
    where = heading(threads=1)
    bare = {VARIANTS[name].beside for name in options.only}
    chosen = {name: BARE[name] for name in BARE if name in bare} | {name: VARIANTS[name] for name in options.only}
    with ExitStack() as stack:
        runners = {name: start(variant, options, stack) for name, variant in chosen.items()}
        for runner in runners.values():
            runner.seconds(options.steps)  # not counted
        turns = [{name: spent(runner, options.steps) for name, runner in runners.items()} for _ in range(options.turns)]
    rows = [row(name, turns, options.steps) for name in options.only]
    print(where, markdown(COLUMNS, rows), sep="\n\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=count, default=2, help="of a turn")
    options = parser.parse_args(arguments)
    if options.turns < 2:
        parser.error(f"--turns={options.turns} must be at least 2, for quartiles")
    return options


def start(variant: Variant, options: argparse.Namespace, stack: ExitStack) -> Runner:
    """Its process, whose model is built, and the other ranks, which follow it. They end with `stack`."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="overhead_"))
    work = Work(
        **SIZES[options.model],
        batch=8,
        log_every=NEVER,
        threads=1,
        compiled=False,
        folder=folder,
        overrides=variant.overrides,
    )
    shared = {"WORLD_SIZE": str(variant.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    for rank in range(1, variant.ranks):
        follow(work, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stack)
    of_first = shared | {"RANK": "0", "LOCAL_RANK": "0"} if variant.ranks > 1 else None
    runner = stack.enter_context(Runner("ours", work, python=Path(sys.executable), variables=of_first))
    runner.ready()
    return runner


def follow(work: Work, variables: Mapping[str, str], stack: ExitStack) -> None:
    """A rank that does every step with the others."""
    command = [sys.executable, "-m", "megatron_lite", "train", *overrides(work)]
    with Path(work.folder, f"log_{variables['RANK']}").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(work.threads) | dict(variables), stdout=log, stderr=log
        )
    stack.callback(process.communicate)
    stack.callback(process.kill)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass(frozen=True)
class Spent:
    """Seconds of one turn on the wall, and of CPU."""

    wall: float
    cpu: float


def spent(runner: Runner, steps: int) -> Spent:
    """What so many steps took."""
    before = cpu_seconds(runner.pid)
    wall = runner.seconds(steps)
    return Spent(wall, cpu_seconds(runner.pid) - before)


def cpu_seconds(process: int) -> float:
    """User and system time of a process and of all that it has started, by Linux's /proc."""
    parents, ticks = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended since
            continue
        number = int(folder.name)
        parents[number], ticks[number] = int(fields[1]), int(fields[11]) + int(fields[12])
    family = {process}
    while grown := {number for number, parent in parents.items() if parent in family} - family:
        family |= grown
    return sum(ticks.get(number, 0) for number in family) / TICK


def row(name: str, turns: Sequence[Mapping[str, Spent]], steps: int) -> list[str]:
    """A line of the table."""
    beside = VARIANTS[name].beside
    low, middle, high = statistics.quantiles([turn[name].wall / turn[beside].wall for turn in turns], n=4)
    mine, without = (sum(turn[which].cpu for turn in turns) for which in (name, beside))
    more = 1e3 * (mine - without) / (len(turns) * steps)
    return [name, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{mine / without:.3f}", f"{more:+.1f}"]


if __name__ == "__main__":
    main()
