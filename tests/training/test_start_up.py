"""What a job does before its first step, counted on each rank: more ranks must not mean more work for any of them."""

from __future__ import annotations

import os
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
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "here", "MASTER_PORT": "0"}
    called: Counter[str] = Counter()

    def counted(name):
        function = getattr(dist, name)

        def call(*args, **kwargs):
            called[name] += 1
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, counted(name))
        patch.setattr(command, "stop", lambda: None)  # the process group is the pool's
        patch.setattr(command, "_report", lambda *_: None)
        patch.setattr(Trainer, "fit", lambda self: "stopped")
        OPENED = []
        command.train(compose_run(words))
        opened, OPENED = OPENED, None
    for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[key]
    ours = [Path(path) for path in opened if path.startswith(tuple(folders))]
    return dict(Counter(path.name for path in ours)), dict(called)


@pytest.mark.parametrize("resumed", [False, True])
def test_no_rank_has_more_to_do_when_there_are_more(resumed, tiny_data, tmp_path):
    seen = {}
    for ranks in (2, 4):
        run_dir = tmp_path / f"ranks{ranks}"
        if resumed:
            runs.run(tiny_data, run_dir, "train.stop_at=1", "train.micro_batch_size=2")
        words = runs.arguments(tiny_data, run_dir, "watchdog.timeout_seconds=0", "train.micro_batch_size=2")
        seen[ranks] = run_ranks(ranks, start_up, words, [str(tiny_data), str(run_dir)])
        for rank in seen[ranks]:
            print(ranks, sum(rank[0].values()), rank)
    first, others = seen[2]
    assert seen[4] == [first, others, others, others]
