"""The harness itself: what a test sees when ranks work, fail or hang."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RanksFailed, run_ranks


def sum_of_ranks(rank: int, world_size: int, scale: float) -> tuple[int, float]:
    value = torch.tensor([rank * scale])
    dist.all_reduce(value)
    return os.getpid(), value.item()


def fails_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("a planted error")
    dist.barrier()


def waits_alone(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(60)


def dies(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(3)


def test_results_come_in_order_from_workers_that_stay() -> None:
    first = run_ranks(2, sum_of_ranks, 2.0)
    second = run_ranks(2, sum_of_ranks, 3.0)
    assert [total for _, total in first] == [2.0, 2.0]
    assert [total for _, total in second] == [3.0, 3.0]
    assert [pid for pid, _ in first] == [pid for pid, _ in second]
    assert len({pid for pid, _ in first}) == 2


def test_an_error_arrives_with_rank_and_traceback() -> None:
    with pytest.raises(RanksFailed, match=r"(?s)rank 1 of 2.*fails_on_rank_one.*a planted error"):
        run_ranks(2, fails_on_rank_one)
    assert [total for _, total in run_ranks(2, sum_of_ranks, 1.0)] == [1.0, 1.0]


def test_a_hang_is_named_with_its_stack() -> None:
    with pytest.raises(RanksFailed, match=r"(?s)^waits_alone on 2 ranks\n--- rank 1 of 2: no answer.*waits_alone"):
        run_ranks(2, waits_alone, timeout=3.0)


def test_a_dead_rank_is_named() -> None:
    with pytest.raises(RanksFailed, match=r"rank 1 of 2: the process died \(exit code 3\)"):
        run_ranks(2, dies)
