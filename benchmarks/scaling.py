"""What a CPU's ranks reach together: tokens/s and efficiency of 1 to 4 gloo ranks with one thread each.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --ranks 1 2 --size tiny --turns 2

Every rank computes a batch of its own, as data-parallel ranks do. In one job the ranks take turns of `--steps` steps in these ways:

    single      the first rank alone, the others wait
    apart       all ranks at once, each a model of its own, nothing is sent
    together    all ranks train one model, sharded as the row says

    efficiency      single / together, in seconds of a step: 1 means that n ranks do n times the work of one
    machine         single / apart: what cores and memory leave of it; with more ranks than cores it is below cores / ranks
    communication   apart / together: what sending, and waiting for each other, leaves of that

The efficiency is the product of the other two. Each is a ratio within a turn, the table has the median over the turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.peers.ours import overrides
from benchmarks.peers.serving import Work
from benchmarks.summary import count, heading, markdown
from benchmarks.train_step import SIZES
from megatron_lite.engine.base import Engine
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.training.build import build_engine, build_grid
from megatron_lite.training.config import compose_run

SHARDED = ("none", "optimizer", "full")  # engine.shard
Turn = dict[str, float]
"""way -> seconds of a step"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table."""
    options = parse(arguments)
    where = heading(model=options.size)
    tokens = options.batch * SIZES[options.size]["length"]
    rows = []
    for ranks in options.ranks:
        turns = on_ranks(ranks, options)
        rows += [row(ranks, shard, turns, tokens=tokens) for shard in SHARDED[: None if ranks > 1 else 1]]
    print(where, markdown(COLUMNS, rows), sep="\n\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--turns", type=count, default=5)
    parser.add_argument("--steps", type=count, default=1, help="of a turn")
    parser.add_argument("--batch", type=count, default=8, help="sequences of a rank")
    options = parser.parse_args(arguments)
    if not all(1 <= ranks <= 64 for ranks in options.ranks):
        parser.error(f"--ranks={options.ranks} must be between 1 and 64")
    return options


COLUMNS = ("ranks", "engine.shard", "tokens/s", "efficiency", "machine", "communication")


def row(ranks: int, shard: str, turns: Sequence[Turn], *, tokens: int) -> list[str]:
    """A line of the table. tokens: of a step of one rank."""
    if ranks == 1:
        return ["1", "", f"{tokens / statistics.median(turn['single'] for turn in turns):,.0f}", "1", "", ""]
    rate = ranks * tokens / statistics.median(turn[shard] for turn in turns)
    ratios = (("single", shard), ("single", "apart"), ("apart", shard))
    medians = [statistics.median(turn[above] / turn[below] for turn in turns) for above, below in ratios]
    return [str(ranks), shard, f"{rate:,.0f}", *(f"{ratio:.2f}" for ratio in medians)]


def on_ranks(ranks: int, options: argparse.Namespace) -> list[Turn]:
    """The turns of a job of `ranks` ranks, seconds averaged over the ranks that took part."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_on_rank, (ranks, options, folder), nprocs=ranks)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    return [
        {way: statistics.fmean(turn[way] for turn in of_all if way in turn) for way in of_all[0]}
        for of_all in zip(*found)
    ]


def _on_rank(rank: int, ranks: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    work = Work(**SIZES[options.size], batch=options.batch, log_every=1, threads=1, compiled=False, folder=folder)
    torch.manual_seed(rank)
    tokens, targets = work.tokens()
    batch = {"tokens": tokens, "targets": targets, "loss_mask": torch.ones_like(tokens, dtype=torch.bool)}
    own, together = engines(overrides(work), ranks)

    def stepping(engine: Engine) -> Callable[[], float]:
        def seconds() -> float:
            began = time.perf_counter()
            for _ in range(options.steps):
                engine.train_step([batch], lr=1e-4)
            return (time.perf_counter() - began) / options.steps

        return seconds

    ways = {"single": stepping(own) if rank == 0 else None, "apart": stepping(own)}
    ways |= {shard: stepping(engine) for shard, engine in together.items()}
    turns = []
    for _ in range(options.turns + 1):  # the first allocates and is not counted
        turn = {}
        for way, seconds in ways.items():
            dist.barrier()
            if seconds is not None:
                turn[way] = seconds()
        turns.append(turn)
    Path(folder, f"{rank}.json").write_text(json.dumps(turns[1:]))
    dist.destroy_process_group()


def engines(words: list[str], ranks: int) -> tuple[Engine, dict[str, Engine]]:
    """This rank's own engine, and those that the ranks share, by what is sharded."""
    together = {}
    for shard in SHARDED if ranks > 1 else ():
        run = compose_run([*words, f"engine.shard={shard}"])
        mesh = build_grid(run.parallel, run.engine, world_size=ranks, device=torch.device("cpu"))
        together[shard] = build_engine(run, mesh)
    return build_engine(compose_run(words), Mesh()), together


if __name__ == "__main__":
    main()
