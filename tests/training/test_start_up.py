"""What a job does before its first step, counted on each rank: more ranks must not mean more work for any of them."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_lite.commands import train as command
from megatron_lite.training.config import compose_run
from megatron_lite.training.trainer import Trainer
from tests import runs
from tests.distributed import run_ranks

COLLECTIVES = (
    "all_gather", "all_gather_object", "all_reduce", "barrier", "broadcast", "broadcast_object_list", "gather_object",
    "monitored_barrier", "new_group", "scatter_object_list",
)  # fmt: skip
OPENED: list[str] | None = None


def _note_open(event: str, arguments: tuple) -> None:
    if OPENED is not None and event == "open" and isinstance(arguments[0], str):
        OPENED.append(arguments[0])


sys.addaudithook(_note_open)


def start_up(rank: int, world_size: int, words: list[str], folders: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Begin a job and stop before its first step: (opened files by name, collectives by name) of this rank."""
    global OPENED
    called: Counter[str] = Counter()

    def counted(name):
        function = getattr(dist, name)

        def call(*args, **kwargs):
            called[name] += 1
            return function(*args, **kwargs)

        return call

    with runs.as_rank(rank, world_size) as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, counted(name))
        patch.setattr(command, "_report", lambda *_: None)
        patch.setattr(Trainer, "fit", lambda self: "stopped")
        OPENED = []
        command.train(compose_run(words))
        opened, OPENED = OPENED, None
    ours = [Path(path) for path in opened if path.startswith(tuple(folders))]
    return dict(Counter(path.name for path in ours)), dict(called)


def counts(ranks: int, data: Path, folder: Path, *, resumed: bool) -> list[tuple[dict[str, int], dict[str, int]]]:
    """`start_up` on so many ranks: of a new run, or of one that has a checkpoint."""
    run_dir = folder / f"{ranks}-{resumed}"
    if resumed:
        runs.run(data, run_dir, "train.stop_at=1", "train.micro_batch_size=1")
    words = runs.arguments(data, run_dir, "watchdog.timeout_seconds=0", "train.micro_batch_size=1")
    return run_ranks(ranks, start_up, words, [str(data), str(run_dir)])


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [False, True])
def test_no_rank_has_more_to_do_when_there_are_more(resumed, tiny_data, tmp_path):
    """But for the files of a checkpoint, which the ranks share out."""
    seen = {ranks: counts(ranks, tiny_data, tmp_path, resumed=resumed) for ranks in (2, 4)}
    for ranks, (first, *others) in seen.items():
        for rank, (files, called) in enumerate((first, *others)):
            expected_files, expected_calls = seen[2][min(rank, 1)]
            assert called == expected_calls, (ranks, rank)
            assert without_tensors(files) == without_tensors(expected_files), (ranks, rank)
            assert {count for name, count in files.items() if name.endswith((".bin", ".idx"))} == {1}, files


def without_tensors(files: dict[str, int]) -> dict[str, int]:
    """The files but those of tensors, temporary ones without their process's number; the mark for the others has a new name each time."""
    return {
        re.sub(r"\.tmp-\d+$", ".tmp", name): count
        for name, count in files.items()
        if not name.endswith(".safetensors") and ".tmp-shared" not in name
    }
