"""The operations of a training step on a CPU, beside their floors and beside their plain forms.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --only attention Mamba-2 --turns 9
    python -m benchmarks.kernels --size tiny --turns 2            a look at the output, in seconds

Each operation runs forward and backward in fp32, in the form that training uses and in the form that its formula suggests. First both
must give the same values and gradients. Then they take turns, and each turn measures two rates of the machine as well:

    matmul rate   FLOP/s of a product of two square matrices
    byte rate     bytes/s, read and written, of a tensor that no cache holds: the faster of a copy and of an addition in place, which
                  writes where it has read (norm and optimizer run on as much)
    floor         max(FLOPs / matmul rate, bytes / byte rate) of the same turn

`benchmarks/operations.py` has the operations, with their FLOPs and bytes. Everything is the median over the turns; a ratio is taken
within each turn. Read the result with benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.operations import FP32, OPERATIONS, SIZES, Operation, Size
from benchmarks.summary import count, heading, markdown


@dataclass(frozen=True)
class Turn:
    """Seconds of one turn."""

    ours: float
    plain: float
    flops: float  # at the matmul rate
    bytes: float  # at the byte rate

    @property
    def floor(self) -> float:
        """What the operation cannot be faster than."""
        return max(self.flops, self.bytes)


COLUMNS = ("operation", "shape", "ours, ms", "floor, ms", "ours / floor", "limit", "plain, ms", "plain / ours")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    where = heading(threads=options.threads)
    size = SIZES[options.size]
    operations = [OPERATIONS[name](size) for name in options.only]
    for operation in operations:
        check(operation)
    machine = Machine(size)
    turns = [[*measured(operations, machine)] for _ in range(options.turns)]
    rows = [row(operation, [turn[i] for turn in turns]) for i, operation in enumerate(operations)]
    print(where, markdown(COLUMNS, rows), sep="\n\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), metavar="OPERATION")
    parser.add_argument("--turns", type=count, default=7)
    parser.add_argument("--threads", type=count, default=1)
    return parser.parse_args(arguments)


def check(operation: Operation) -> None:
    """Raises ValueError if the two forms do not compute the same. Also warms them up.

    The bound is 1e-3 of the largest entry: the forms sum up to some thousand fp32 numbers in other orders.
    """
    for mine, theirs in zip(operation.ours(), operation.plain(), strict=True):
        off = ((mine - theirs).abs().max() / theirs.abs().max()).item()
        if not off < 1e-3:
            raise ValueError(f"{operation.name}: the two forms differ by {off:.1e} of the largest entry")


class Machine:
    """Measures the two rates; its tensors are made once, so that no copy waits for fresh memory."""

    def __init__(self, size: Size) -> None:
        self.square = torch.randn(size.square, size.square)
        self.source, self.target = (torch.ones(size.large * 2**20 // FP32) for _ in range(2))

    def matmul_rate(self) -> float:
        """FLOP/s."""
        return 2 * len(self.square) ** 3 / seconds(lambda: self.square @ self.square)

    def byte_rate(self) -> float:
        """Bytes/s, read and written."""
        copied, added = 2 * self.source.nbytes, 3 * self.source.nbytes
        return max(
            copied / seconds(lambda: self.target.copy_(self.source)),
            added / seconds(lambda: self.target.add_(self.source)),
        )


def measured(operations: Sequence[Operation], machine: Machine) -> Iterator[Turn]:
    """One turn of each operation, with the rates of this turn."""
    matmul_rate, byte_rate = machine.matmul_rate(), machine.byte_rate()
    for operation in operations:
        yield Turn(
            seconds(operation.ours),
            seconds(operation.plain),
            flops=operation.flops / matmul_rate,
            bytes=operation.bytes / byte_rate,
        )


def seconds(action: Callable[[], object], *, least: float = 0.02) -> float:
    """Seconds of a call: the mean over so many that they take `least` seconds together."""
    calls, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < least or not calls:
        action()
        calls += 1
    return passed / calls


def row(operation: Operation, turns: Sequence[Turn]) -> list[str]:
    """A line of the table."""
    ours, floor, plain = (statistics.median(getattr(turn, key) for turn in turns) for key in ("ours", "floor", "plain"))
    over_floor = statistics.median(turn.ours / turn.floor for turn in turns)
    over_ours = statistics.median(turn.plain / turn.ours for turn in turns)
    by_flops = statistics.median(turn.flops - turn.bytes for turn in turns) > 0
    return [
        operation.name,
        operation.shape,
        f"{1e3 * ours:.3g}",
        f"{1e3 * floor:.3g}",
        f"{over_floor:.1f}",
        "FLOPs" if by_flops else "bytes",
        f"{1e3 * plain:.3g}",
        f"{over_ours:.1f}",
    ]


if __name__ == "__main__":
    main()
