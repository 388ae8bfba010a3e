"""`mlite preflight`: check the nodes of a run before it starts. `mlite launch <where> ... check=true` runs it on the run's ranks.

torchrun --nproc-per-node 2 -m megatron_lite preflight experiment=smoke_cluster

It takes the arguments of `mlite train`, checks the config for all ranks, compares and measures the nodes
(`training/preflight.py`), prints two tables, and exits with 1 if a host differs.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_lite.commands.command import run_command
from megatron_lite.commands.ranks import all_ranks
from megatron_lite.errors import WorkFailedError
from megatron_lite.training.build import build_schedule
from megatron_lite.training.config import RunConfig, validate
from megatron_lite.training.preflight import UNITS, Bandwidth, Report, bandwidths, measure, out_of_line

WAIT_SECONDS = 180.0  # a network that does not carry a collective in this time does not carry a training


def main() -> None:
    """Parse, check, exit: 0 if all is well, 1 if a host differs, 2 for an invalid config."""
    run_command("train", RunConfig, "Check the nodes of a run: same software, same speed, one file system.", preflight)


def preflight(run: RunConfig) -> int:
    """Check the ranks that run this. Raises WorkFailedError on rank 0 if a host differs."""
    with all_ranks(timeout_seconds=WAIT_SECONDS) as (runtime, ranks):
        validate(run, runtime.world_size)
        build_schedule(run)
        reports = measure(runtime, ranks, Path(run.run.dir))
        nodes = ranks.first("nodes", lambda: sum(report.local_rank == 0 for report in reports))
        rows = list(bandwidths(runtime, runtime.world_size // nodes))
        if not runtime.is_main:
            return 0
        _print(reports, rows, nodes)
        if wrong := out_of_line(reports):
            raise WorkFailedError("; ".join(wrong))
        print(f"{nodes} node(s), {len(reports)} rank(s): all the same, and as fast as each other")
    return 0


def _print(reports: list[Report], rows: list[Bandwidth], nodes: int) -> None:
    console = Console(width=100)
    print(f"{nodes} node(s), {len(reports)} rank(s); {', '.join(f'{k} {v}' for k, v in reports[0].same.items())}")
    table = Table("speed of a rank", "slowest", "median", "fastest")
    for key, unit in UNITS.items():
        speeds = [report.speeds[key] for report in reports if key in report.speeds]
        if speeds:
            values = (min(speeds), statistics.median(speeds), max(speeds))
            table.add_row(f"{key}, {unit}", *(f"{value:.3g}" for value in values))
    console.print(table)
    if rows:
        table = Table("collective", "over", "bytes", "bus GB/s")
        for row in rows:
            table.add_row(row.operation, row.scope, f"{row.size:,}", f"{row.speed:.3g}")
        console.print(table)
