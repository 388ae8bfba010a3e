"""Where the time of a training step on a CPU goes: `mlite train` by groups of operators, each beside its floor.

    python -m benchmarks.step_parts                              the work of benchmarks.train_step, on one thread
    python -m benchmarks.step_parts --model 50m --threads 2

A group's time is that of its operators in the profile which `profile.steps` writes; what they call counts for them. Its floor is
FLOPs / matmul rate + bytes / copy rate, with every input read and every result written once, and both rates measured in the same
process, on the very shapes (`peers/matmuls.py`) and on 64 MiB. Profiling makes a step a little longer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.matmuls import products
from benchmarks.peers.ours import overrides
from benchmarks.peers.serving import Work
from benchmarks.summary import machine, markdown
from benchmarks.train_step import SIZES
from megatron_lite.commands.train import train
from megatron_lite.tracking.profile import TRACE
from megatron_lite.training.config import compose_run

STEPS, FP32 = 3, 4
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")
BETWEEN = "between operators: Python, autograd, data"


@dataclass(frozen=True)
class Group:
    """marks: parts of the names of its operators, or of what they are called by. flops, numbers: of one step, its floor; numbers are
    read or written, 4 bytes each."""

    name: str
    marks: tuple[str, ...]
    flops: float = 0.0
    numbers: float = 0.0


def groups(work: Work) -> list[Group]:
    """The groups; an operator belongs to the first one that it bears a mark of."""
    D, F, V, layers, tokens = work.hidden, work.ffn, work.vocabulary, work.layers, work.batch * work.length
    weights = layers * (4 * D * D + 2 * D * F) + V * D
    return [
        Group("matrix products", PRODUCTS, flops=6.0 * weights * tokens),
        # two products forward and twice as many backward, of half of the pairs of tokens
        Group("attention", ("scaled_dot_product",), flops=6.0 * work.length * D * tokens * layers),
        Group("loss, its products aside", ("_ChunkedLossSum",), numbers=2.0 * tokens * V + 3.0 * V * D),
        Group("squared ReLU", ("_SquaredReLU",), numbers=5.0 * tokens * F * layers),
        Group("rotation", ("_Rotary",), numbers=4.0 * tokens * 2 * D * layers),
        Group("norms", ("layer_norm", "LayerNorm"), numbers=5.0 * tokens * D * (2 * layers + 1)),
        Group("residual sums", ("aten::add",), numbers=2 * 3.0 * tokens * D * 2 * layers),
        Group("gradient norm, clipping", ("vector_norm", "foreach_mul"), numbers=3.0 * (weights + V * D)),
        Group("AdamW", ("AdamW.step",), numbers=7.0 * (weights + V * D)),
        Group("embedding", ("embedding", "Embedding"), numbers=2.0 * tokens * D + V * D),
        Group("copies", ("aten::cat", "aten::copy_", "aten::clone", "aten::contiguous")),
        Group("other operators", ("aten::",)),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="step_parts_") as folder:
        work = Work(
            **SIZES[options.model],
            batch=options.batch,
            log_every=1,
            threads=options.threads,
            compiled=False,
            folder=folder,
        )
        before = rates(work)
        trace = profiled(work)
        after = rates(work)
    flops, numbers = (max(pair) for pair in zip(before, after))
    where = machine() | {"threads": options.threads, "model": options.model}
    where |= {"matmul rate, GFLOP/s": f"{flops / 1e9:.0f}", "copy rate, GB/s": f"{numbers * FP32 / 1e9:.1f}"}
    print("; ".join(f"{key} {value}" for key, value in where.items()))
    print(markdown(("group", "ms", "share", "floor, ms", "over floor"), rows(work, trace, flops, numbers)))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def profiled(work: Work) -> list[dict[str, Any]]:
    """The events of the main thread in `STEPS` steps of `mlite train`, in the order of their beginning."""
    words = [word for word in overrides(work) if not word.startswith("train.max_steps=")]
    train(compose_run([*words, f"train.max_steps={STEPS + 3}", f"profile.steps={STEPS}", "checkpoint.every=0"]))
    events = json.loads((Path(work.folder) / "run/profile" / TRACE).read_text())["traceEvents"]
    (thread,) = {event["tid"] for event in events if event.get("name") == "step"}
    own = [event for event in events if event.get("ph") == "X" and event["tid"] == thread and "dur" in event]
    return sorted(own, key=lambda event: (event["ts"], -event["dur"]))


def own_times(events: list[dict[str, Any]]) -> Iterator[tuple[tuple[str, ...], float]]:
    """(names of an event and of those around it, the innermost first; its microseconds without those inside it)."""
    around: list[dict[str, Any]] = []
    for event in events:
        while around and event["ts"] >= around[-1]["ts"] + around[-1]["dur"]:
            yield _closed(around)
        if around:
            around[-1]["inside"] = around[-1].get("inside", 0.0) + event["dur"]
        around.append(event)
    while around:
        yield _closed(around)


def _closed(around: list[dict[str, Any]]) -> tuple[tuple[str, ...], float]:
    names = tuple(event["name"] for event in reversed(around))
    event = around.pop()
    return names, event["dur"] - event.get("inside", 0.0)


def rows(work: Work, events: list[dict[str, Any]], flops: float, numbers: float) -> list[list[str]]:
    """The lines of the table, from events and the rates of FLOPs and of numbers read or written."""
    table, spent = groups(work), defaultdict(float)
    for names, microseconds in own_times(events):
        spent[group_of(names, table)] += microseconds / 1e3 / STEPS
    total = sum(spent.values())
    floors = {group.name: 1e3 * (group.flops / flops + group.numbers / numbers) for group in table}
    lines = []
    for name in [*floors, BETWEEN]:
        lines.append(_line(name, spent[name], total, floors.get(name, 0.0)))
    return [*lines, _line("a step", total, total, sum(floors.values()))]


def _line(name: str, spent: float, total: float, floor: float) -> list[str]:
    shown = [f"{floor:.2f}", f"{spent / floor:.2f}"] if floor else ["", ""]
    return [name, f"{spent:.2f}", f"{spent / total:.1%}", *shown]


def group_of(names: tuple[str, ...], table: list[Group]) -> str:
    """The group of an event from its name and those around it."""
    if not names[0].startswith(("aten::", "fbgemm::", "mkldnn::")):
        return BETWEEN
    for group in table:
        exact = names[0] in group.marks
        if exact or (group.marks is not PRODUCTS and any(mark in name for mark in group.marks for name in names)):
            return group.name
    return BETWEEN


def rates(work: Work) -> tuple[float, float]:
    """(FLOP/s of the step's matrix products, numbers per second that a copy reads or writes)."""
    own = products(work)
    flops = sum(6.0 * x.shape[0] * weight.numel() for x, weight, _ in own)

    def multiply() -> None:
        for x, weight, gradient in own:
            torch.mm(x, weight.T)
            torch.mm(gradient, weight)
            torch.mm(gradient.T, x)

    source = torch.zeros(2**24)
    target = torch.empty_like(source)
    return flops / _fastest(multiply), 2.0 * source.numel() / _fastest(lambda: target.copy_(source))


def _fastest(action: Callable[[], object]) -> float:
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


if __name__ == "__main__":
    main()
