"""Which ranks cause a hang, from the notes that every rank publishes about itself. Pure functions of these notes.

    on a CPU    a rank that is in none of torch's collectives keeps the others waiting: its stack says so
    on a GPU    a stack says little: backward runs in another thread, and a host that waits for a GPU does so wherever the queue of
                kernels is full. The rank that has entered the fewest phases keeps the others waiting; of several, those that have
                no unfinished collective in NCCL's flight recorder

A note is {"step", "phase", "entered": number of phases entered, "waits": whether it waits for others, "at": place in the code}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

Note = Mapping[str, Any]

# A rank waits for others in torch's collectives, and in modules of ours that set `WAITS_FOR_OTHER_RANKS = True`.
_WAITING = "torch/distributed/"
_PASSED_THROUGH = (
    "torch/_ops.py",
    "torch/_library/",
    "torch/utils/",
    "torch/autograd/",
    "contextlib.py",
    "torch/_dynamo/",
)


def waits_for_others(frame: FrameType | None) -> bool:
    """Whether the innermost frame, wrappers of torch left aside, is in a collective or waits for one."""
    while frame is not None and any(part in frame.f_code.co_filename for part in _PASSED_THROUGH):
        frame = frame.f_back
    if frame is None:
        return False
    return _WAITING in frame.f_code.co_filename or bool(frame.f_globals.get("WAITS_FOR_OTHER_RANKS"))


def has_unfinished_collective(record: bytes) -> bool:
    """Whether a flight recorder's JSON knows a collective that was asked for and is not complete; False if it says nothing."""
    groups = json.loads(record).get("pg_status", {}).values()
    return any(int(g["last_enqueued_collective"]) > int(g["last_completed_collective"]) for g in groups)


def place(frame: FrameType | None) -> str:
    """The innermost line outside of torch, e.g. `megatron_lite/engine/fsdp.py:131 train_step`."""
    while frame is not None and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return "an unknown place"
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-3:])}:{frame.f_lineno} {frame.f_code.co_name}"


def culprits(notes: Mapping[int, Note], *, on_gpu: bool) -> list[int]:
    """The ranks that keep the others waiting; empty if the notes do not tell."""
    if not on_gpu:
        return [rank for rank, note in notes.items() if not note["waits"]]
    least = min((note["entered"] for note in notes.values()), default=0)
    behind = [rank for rank, note in notes.items() if note["entered"] == least]
    idle = [rank for rank in behind if not notes[rank]["waits"]]
    found = idle or behind
    return found if len(found) < len(notes) else []


def verdict(
    notes: Mapping[int, Note], *, last_seen: Mapping[int, Note], world_size: int, on_gpu: bool = False
) -> list[str]:
    """Who does not answer, who is stuck and who waits, in words. last_seen: the latest heartbeat of each rank."""
    parts = []
    silent = [rank for rank in range(world_size) if rank not in notes]
    for rank in silent[:8]:
        parts.append(f"rank {rank} does not answer ({seen(last_seen.get(rank))})")
    stuck = culprits(notes, on_gpu=on_gpu)
    for rank in stuck[:8]:
        note = notes[rank]
        parts.append(f"rank {rank} is stuck in step {note['step']}, {note['phase']}, at {note['at']}")
    waiting = sorted(set(notes) - set(stuck))
    if waiting:
        first = notes[waiting[0]]
        verb = "wait" if len(waiting) > 1 else "waits"
        where = f"step {first['step']}, {first['phase']}, at {first['at']}"
        parts.append(f"{numbers(waiting)} {verb} for others in {where}")
    return parts


def seen(beat: Note | None) -> str:
    """What a rank's latest heartbeat says."""
    return f"last seen in step {beat['step']}, {beat['phase']}" if beat else "never seen"


def numbers(ranks: Sequence[int]) -> str:
    """`rank 3` or `ranks 0-2, 7`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
