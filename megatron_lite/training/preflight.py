"""Checks of the nodes of a run before it starts: are they identical, fast, connected, and on one shared file system?

Notable features:
- every rank measures and rank 0 compares: there `measure` returns one Report per rank, and `out_of_line` names the hosts
  that differ;
- speeds are compared with the fastest of the same kind, so that no table of expected values is needed;
- a ring between the nodes (every rank sends to the next node, all at once) shows which link is slow; collectives only show
  that some link is.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lite.ranks import Ranks
from megatron_lite.runtime import Runtime
from megatron_lite.training.gpu_memory import memory_faults

# A host is reported below this fraction of the fastest host's speed. Matmuls differ by a few percent between GPUs of the
# same model (clocks, temperature), file systems by the load from other users.
SLOW = {"matmul": 0.85, "link": 0.6, "write": 0.3}
UNITS = {"matmul": "TFLOP/s", "link": "GB/s", "write": "GB/s"}
CLOCK_SECONDS = 1.0  # between two hosts: time stamps of logs and checkpoints, certificates
WRITE_BYTES = 64 * 2**20
SEEN_SECONDS = 30.0  # NFS shows another client's new file with a delay


@dataclass(frozen=True)
class Report:
    """What one rank found.

    same: what must be equal on all ranks. speeds: by the keys of SLOW, in UNITS. clock: seconds since 1970, taken by all ranks
    at once. unseen: the ranks whose file in the run directory this rank's node does not see. faults: of the GPU's memory.
    """

    rank: int
    local_rank: int
    host: str
    same: dict[str, str]
    speeds: dict[str, float]
    clock: float
    unseen: tuple[int, ...] = ()
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bandwidth:
    """The bus bandwidth of a collective, as nccl-tests counts it: GB/s that every rank sends, by the slowest rank's time."""

    operation: str
    scope: str  # "one node" or "all nodes"
    size: int  # bytes
    speed: float


def measure(runtime: Runtime, ranks: Ranks, run_dir: Path) -> list[Report]:
    """Every rank's report on rank 0, an empty list elsewhere. Leaves nothing in `run_dir`. Raises CheckpointError if a rank fails."""
    ranks.agree("compare", lambda: None)
    clock = time.time()
    locals_ = ranks.gather("local ranks", lambda: runtime.local_rank)
    firsts = ranks.first("nodes", lambda: [rank for rank, local in enumerate(locals_) if local == 0])
    speeds = {"matmul": ranks.agree("matmul", lambda: matmul_speed(runtime.device))}
    if len(firsts) > 1 and runtime.world_size % len(firsts) == 0:
        speeds["link"] = ranks.agree("ring", lambda: ring_speed(runtime, runtime.world_size // len(firsts)))
    written, unseen = _files(runtime, ranks, run_dir, firsts)
    speeds |= written
    report = Report(
        runtime.rank, runtime.local_rank, socket.gethostname(), versions(runtime.device), speeds, clock, unseen,
        memory_faults(runtime.device),
    )  # fmt: skip
    return ranks.gather("reports", lambda: report)


def versions(device: torch.device) -> dict[str, str]:
    """What must be the same on all ranks."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        code.update(path.read_bytes())
    found = {
        "code": code.hexdigest()[:12],
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformer_engine": _installed("transformer_engine"),
        "device": str(device.type),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def matmul_speed(device: torch.device) -> float:
    """TFLOP/s of a square matmul, the best of a few: bf16 on a GPU, fp32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a = torch.ones(size, size, dtype=dtype, device=device)
    seconds = min(_seconds(lambda: a @ a, device) for _ in range(8))
    return 2 * size**3 / seconds / 1e12


def ring_speed(runtime: Runtime, ranks_per_node: int) -> float:
    """GB/s at which this rank receives from its counterpart on the node before, while all ranks send to the node after."""
    size = 2**28 if runtime.device.type == "cuda" else 2**20
    sent = torch.ones(size // 4, device=runtime.device)
    received = torch.empty_like(sent)

    def shift() -> None:
        send = dist.P2POp(dist.isend, sent, (runtime.rank + ranks_per_node) % runtime.world_size)
        receive = dist.P2POp(dist.irecv, received, (runtime.rank - ranks_per_node) % runtime.world_size)
        for work in dist.batch_isend_irecv([send, receive]):
            work.wait()

    return size / min(_seconds(shift, runtime.device) for _ in range(5)) / 1e9


def bandwidths(runtime: Runtime, ranks_per_node: int) -> Iterator[Bandwidth]:
    """All-reduce and all-gather by size, inside the nodes and across all of them; every rank calls it, and gets the same."""
    if runtime.world_size == 1:
        return
    groups: dict[str, dist.ProcessGroup | None] = {"all nodes": None}
    if 1 < ranks_per_node < runtime.world_size:
        groups = {"one node": dist.new_subgroups(ranks_per_node)[0], **groups}
    sizes = [2**20, 2**24, 2**28] if runtime.device.type == "cuda" else [2**16, 2**20]
    for scope, group in groups.items():
        count = dist.get_world_size(group)
        for size in sizes:
            whole = torch.ones(size // 4 // count * count, device=runtime.device)
            part = whole[: len(whole) // count].clone()
            works: dict[str, tuple[Callable[[], object], float]] = {
                "all-reduce": (lambda: dist.all_reduce(whole, group=group), 2 * (count - 1) / count),  # noqa: B023
                "all-gather": (lambda: dist.all_gather_into_tensor(whole, part, group=group), (count - 1) / count),  # noqa: B023
            }
            for operation, (work, factor) in works.items():
                slowest = runtime.maximum([min(_seconds(work, runtime.device) for _ in range(4))])[0]
                yield Bandwidth(operation, scope, size, factor * size / slowest / 1e9)


def out_of_line(reports: list[Report]) -> list[str]:
    """One line for everything that is not as on the other ranks; hosts are named with the rank."""
    faults = [f"the GPU of {_names([report])} has {fault}" for report in reports for fault in report.faults]
    return [*_different(reports), *_slow(reports), *_clocks(reports), *_unseen(reports), *faults]


def _different(reports: list[Report]) -> Iterator[str]:
    for key in sorted({key for report in reports for key in report.same}):
        (usual, count), *others = Counter(report.same.get(key, "none") for report in reports).most_common()
        for value, _ in others:
            where = _names([report for report in reports if report.same.get(key, "none") == value])
            yield f"{key} is {value} on {where}, and {usual} on {count} other rank(s)"


def _slow(reports: list[Report]) -> Iterator[str]:
    for key, least in SLOW.items():
        speeds = {report.rank: report.speeds[key] for report in reports if key in report.speeds}
        best = max(speeds.values(), default=0.0)
        for report in reports:
            if speeds.get(report.rank, best) < least * best:
                unit = UNITS[key]
                yield f"{key} is slow on {_names([report])}: {speeds[report.rank]:.3g} {unit}, the fastest has {best:.3g} {unit}"


def _clocks(reports: list[Report]) -> Iterator[str]:
    middle = sorted(report.clock for report in reports)[len(reports) // 2]
    for report in reports:
        if report.local_rank == 0 and abs(report.clock - middle) > CLOCK_SECONDS:
            yield f"the clock of {_names([report])} is {report.clock - middle:+.1f} s off"


def _unseen(reports: list[Report]) -> Iterator[str]:
    hosts = {report.rank: report for report in reports}
    for report in reports:
        if report.unseen:
            others = _names([hosts[rank] for rank in report.unseen])
            yield f"run.dir on {_names([report])} does not show what {others} wrote there: it is not on a file system that all share"


def _names(reports: list[Report]) -> str:
    shown = ", ".join(f"{report.host} (rank {report.rank})" for report in reports[:4])
    return shown + (f" and {len(reports) - 4} more" if len(reports) > 4 else "")


def _files(
    runtime: Runtime, ranks: Ranks, run_dir: Path, firsts: list[int]
) -> tuple[dict[str, float], tuple[int, ...]]:
    """The first rank of every node writes a file into the run directory and looks for those of the others."""
    folder = run_dir / f".preflight-{ranks.first('name', lambda: time.time_ns())}"
    mine = folder / str(runtime.rank)
    is_first = runtime.rank in firsts
    written: dict[str, float] = {}

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        with mine.open("wb", buffering=0) as file:
            file.write(b"\0" * WRITE_BYTES)
            os.fsync(file.fileno())
        written["write"] = WRITE_BYTES / (time.monotonic() - begun) / 1e9

    def look() -> tuple[int, ...]:
        end = time.monotonic() + SEEN_SECONDS
        while unseen := tuple(rank for rank in firsts if not (folder / str(rank)).exists()):
            if time.monotonic() > end:
                break
            time.sleep(1.0)
        return unseen

    def remove() -> None:
        mine.unlink()

    ranks.agree("write to run.dir", write if is_first else lambda: None)
    unseen = ranks.agree("look into run.dir", look if is_first else lambda: ())
    ranks.agree("clean up run.dir", remove if is_first else lambda: None)
    ranks.agree("clean up run.dir", lambda: _remove_empty(folder) if is_first else None)
    return written, unseen


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # another node of the same file system was faster
        return


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes, the device's part included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
