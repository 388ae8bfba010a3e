"""Training steps on a CPU: `mlite train` in turn with other implementations of the same work.

    python -m benchmarks.train_step                                      every peer, 15 pairs of 4 steps
    python -m benchmarks.train_step --model 50m --peers eager compiled
    benchmarks/peers/environment.sh                                      before it, for megatron-core and OLMo-core

For each peer, ours and the peer are a process each, which build their model once. Then they run `--steps` steps in turn, one waiting
while the other computes: ours, peer, ours, peer. A pair is two neighboring turns, and a ratio is the peer's seconds over ours: above 1,
ours is faster. Ours is the whole command (data from disk, checks, metrics.jsonl), a peer is a loop over one batch in memory.
The loss is read, and ours logged, once a turn. Read the result with benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.peers.serving import Work
from benchmarks.summary import machine, markdown

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / "benchmarks/peers/.venv"

SIZES = {  # the shapes of a decoder, by name
    "tiny": {"layers": 1, "hidden": 32, "heads": 2, "ffn": 64, "vocabulary": 256, "length": 32},
    "small": {"layers": 4, "hidden": 256, "heads": 4, "ffn": 1024, "vocabulary": 8192, "length": 256},
    "50m": {"layers": 10, "hidden": 512, "heads": 8, "ffn": 2048, "vocabulary": 16384, "length": 256},
}


@dataclass(frozen=True)
class Peer:
    """module: the file in benchmarks/peers. separate: it needs the environment of environment.sh. compiled: so is ours beside it.
    logs: its loss is read once a turn."""

    module: str
    separate: bool = False
    compiled: bool = False
    logs: bool = True


PEERS = {
    "eager": Peer("eager"),
    "compiled": Peer("eager", compiled=True),
    "huggingface": Peer("huggingface"),
    "megatron-core": Peer("megatron_core", separate=True),
    "olmo-core": Peer("olmo_core", separate=True),
    "matmuls": Peer("matmuls"),
    "unlogged": Peer("ours", logs=False),
}
_NEVER = 1_000_000  # steps between two rows


class PeerFailedError(Exception):
    """A process ended, or never started; the message is the end of what it printed."""


def environment(threads: int) -> dict[str, str]:
    """Of a process that imports this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}


class Runner:
    """A process that does steps of the work when asked to. A context manager, which ends it. variables: of its environment."""

    def __init__(self, module: str, work: Work, *, python: Path, variables: Mapping[str, str] | None = None) -> None:
        self._module, self._log = module, Path(work.folder) / "log"
        if not python.exists():
            raise PeerFailedError(f"there is no {python}; benchmarks/peers/environment.sh makes it")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", f"benchmarks.peers.{module}", json.dumps(asdict(work))],
                cwd=ROOT,
                env=environment(work.threads) | dict(variables or {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
            )

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def ready(self) -> str:
        """The version of its torch, when its model is built."""
        return self._answer("ready")

    def seconds(self, steps: int) -> float:
        """How long `steps` steps took."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # of a process that has ended: there will be no answer either
            self._process.stdin.write(f"{steps}\n")
        return float(self._answer("seconds"))

    def _answer(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(f"{word} "):  # anything else was printed while it imported
                return line.split()[1]
        raise PeerFailedError(f"{self._module} ended: " + "; ".join(self._log.read_text().strip().splitlines()[-3:]))


@dataclass(frozen=True)
class Result:
    """The seconds of every turn, in order, and those of the first one, which is not counted."""

    ours: list[float]
    peer: list[float]
    first: tuple[float, float]
    torch: str

    def row(self, name: str, tokens: int) -> list[str]:
        """A line of the table. tokens: of one turn."""
        ratios = [peer / ours for ours, peer in zip(self.ours, self.peer)]
        low, middle, _ = statistics.quantiles(ratios, n=4, method="inclusive")
        rates = [f"{tokens / statistics.median(seconds):,.0f}" for seconds in (self.ours, self.peer)]
        return [name, f"{middle:.3f}", f"{low:.3f}", *rates, " / ".join(f"{s:.1f}" for s in self.first), self.torch]


COLUMNS = (
    "peer", "median ratio", "lower quartile", "ours, tokens/s", "peer, tokens/s", "first turn, s (ours / peer)", "peer's torch",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table, and a line for each peer that could not run."""
    options = parse(arguments)
    where = machine() | {"threads": options.threads, "model": options.model, "pairs": options.pairs}
    rows, missing = [], []
    for name in options.peers:
        try:
            result = compare(PEERS[name], options)
        except PeerFailedError as error:
            missing.append(f"{name} is left out: {error}")
            continue
        rows.append(result.row(name, options.steps * options.batch * SIZES[options.model]["length"]))
        print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    print("; ".join(f"{key} {value}" for key, value in where.items()), markdown(COLUMNS, rows), *missing, sep="\n\n")
    if not rows:
        sys.exit(1)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a process; default: the cores")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="what environment.sh made")
    options = parser.parse_args(arguments)
    for key, least in (("pairs", 2), ("steps", 1), ("batch", 1), ("threads", 1)):
        if getattr(options, key) < least:
            parser.error(f"--{key}={getattr(options, key)} must be at least {least}")
    return options


def compare(peer: Peer, options: argparse.Namespace) -> Result:
    """Run the pairs. Raises PeerFailedError if a process fails."""
    with ExitStack() as stack:

        def start(module: str, python: Path, *, log_every: int) -> Runner:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{module}_"))
            work = Work(
                **SIZES[options.model],
                batch=options.batch,
                log_every=log_every,
                threads=options.threads,
                compiled=peer.compiled,
                folder=folder,
            )
            return stack.enter_context(Runner(module, work, python=python))

        own = Path(sys.executable)
        theirs = options.environment.absolute() / "bin/python" if peer.separate else own
        other = start(peer.module, theirs, log_every=options.steps if peer.logs else _NEVER)
        version = other.ready()
        ours = start("ours", own, log_every=options.steps)
        ours.ready()
        first = ours.seconds(options.steps), other.seconds(options.steps)
        turns = [(ours.seconds(options.steps), other.seconds(options.steps)) for _ in range(options.pairs)]
    return Result([turn[0] for turn in turns], [turn[1] for turn in turns], first=first, torch=version)


if __name__ == "__main__":
    main()
