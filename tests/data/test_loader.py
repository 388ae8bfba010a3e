"""The loader gives the same samples whatever the layout, and behaves when something goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.data.config import DataConfig
from megatron_lite.data.loader import DataLoader, rank_samples, validation_batches
from megatron_lite.data.packing import Example
from megatron_lite.data.sidecar import TokenizerIdentity
from megatron_lite.data.source import Source
from tests.distributed import PATIENCE_SECONDS


class Numbers:
    """Sample i holds the number i, so that a batch says which samples it is made of."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.read = 0

    def __getitem__(self, i: int) -> Example:
        if i == self.fails_at:
            raise ValueError(f"sample {i} is broken")
        self.read = max(self.read, i)
        return {"tokens": np.array([i, i]), "loss_mask": np.array([True, False])}


def ramp(consumed: int) -> int:
    return 12 if consumed < 30 else 24


def samples_of(steps: Iterator, count: int) -> list[list[int]]:
    """The sample numbers of the first `count` steps."""
    found = []
    for _, (_, batches) in zip(range(count), steps):
        found.append([int(i) for batch in batches for i in batch["tokens"][:, 0]])
    return found


@given(
    consumed=st.integers(0, 10**13), micro=st.integers(1, 5), ranks=st.integers(1, 6), accumulation=st.integers(1, 5)
)
def test_ranks_share_a_step_out_exactly(consumed: int, micro: int, ranks: int, accumulation: int) -> None:
    batch = micro * ranks * accumulation
    split = [rank_samples(consumed, batch=batch, micro_batch=micro, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert all(len(mine) == accumulation and {len(m) for m in mine} == {micro} for mine in split)
    everything = sorted(i for mine in split for numbers in mine for i in numbers)
    assert everything == list(range(consumed, consumed + batch))
    # The m-th micro-batches of all ranks are neighbors: what a step sees in which order is that of one rank.
    joined = [i for m in range(accumulation) for mine in split for i in mine[m]]
    assert joined == everything


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 3])
def test_the_union_over_ranks_is_the_same_for_any_number_of_ranks(ranks: int, micro: int) -> None:
    loaders = [DataLoader(Numbers(), micro_batch_size=micro, rank=rank, ranks=ranks) for rank in range(ranks)]
    steps = [samples_of(loader.steps(6, lambda at: 36 if at < 70 else 72), 4) for loader in loaders]
    union = [sorted(i for mine in step for i in mine) for step in zip(*steps)]
    assert union == [list(range(6, 42)), list(range(42, 78)), list(range(78, 150)), list(range(150, 222))]


def test_going_on_from_any_step_gives_the_same_steps() -> None:
    loader = DataLoader(Numbers(), micro_batch_size=2)
    straight = samples_of(loader.steps(0, ramp), 6)
    resumed = samples_of(loader.steps(12, ramp), 5)
    assert straight[1:] == resumed


def test_batches_are_contiguous_tensors_and_say_the_global_size() -> None:
    loader = DataLoader(Numbers(), micro_batch_size=2, rank=1, ranks=3)
    steps = loader.steps(0, ramp)
    size, batches = next(iter(steps))
    assert size == 12
    assert [batch["tokens"].tolist() for batch in batches] == [[[2, 2], [3, 3]], [[8, 8], [9, 9]]]
    assert batches[0]["tokens"].dtype == torch.int64
    assert batches[0]["loss_mask"].dtype == torch.bool
    assert all(tensor.is_contiguous() for tensor in batches[0].values())


def test_stop_ends_the_iterator_and_its_thread() -> None:
    before = threading.active_count()
    steps = list(DataLoader(Numbers(), micro_batch_size=12).steps(0, ramp, stop=30))
    assert [size for size, _ in steps] == [12, 12, 12]
    assert threading.active_count() == before


def test_reading_ahead_is_bounded_and_closing_ends_the_thread() -> None:
    before = threading.active_count()
    numbers = Numbers()
    steps = DataLoader(numbers, micro_batch_size=12).steps(0, lambda consumed: 12)
    next(steps)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while numbers.read < 35 and time.monotonic() < deadline:  # two steps ahead of the one taken
        time.sleep(0.01)
    time.sleep(0.05)
    assert 35 <= numbers.read < 4 * 12  # one more may be in the making
    steps.close()
    assert threading.active_count() == before
    DataLoader(numbers, micro_batch_size=12).steps(0, ramp).close()  # never begun
    assert threading.active_count() == before


def test_what_goes_wrong_in_the_thread_is_raised_here_after_the_good_steps() -> None:
    before = threading.active_count()
    steps = DataLoader(Numbers(fails_at=25), micro_batch_size=4).steps(0, ramp)
    assert samples_of(steps, 2) == [list(range(12)), list(range(12, 24))]
    with pytest.raises(ValueError, match="sample 25 is broken"):
        next(steps)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (10, r"global batch of 10 .*micro_batch_size=2 x 3 .* = 6; 6 or 12 would do"),
        (4, r"global batch of 4 .*; 6 would do"),
        (0, r"global batch of 0 .*; 6 would do"),
    ],
)
def test_batches_that_do_not_divide_are_refused(batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_samples(0, batch=batch, micro_batch=2, rank=0, ranks=3)
    loader = DataLoader(Numbers(), micro_batch_size=2, ranks=3)
    with pytest.raises(ValueError, match=message):
        next(loader.steps(0, lambda consumed: batch))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.micro_batch_size=0 must be at least 1"):
        DataLoader(Numbers(), micro_batch_size=0)
    with pytest.raises(ValueError, match=r"rank 2 must be in \[0, 2\)"):
        DataLoader(Numbers(), micro_batch_size=1, rank=2, ranks=2)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("windows", [1, 5, 12, 1000])
def test_validation_counts_each_of_the_first_windows_once(
    write_source: Callable, tokenizer: TokenizerIdentity, ranks: int, windows: int
) -> None:
    source = Source("a/x", write_source("x")[0], config=DataConfig(seq_len=16), tokenizer=tokenizer)
    by_rank = [
        list(validation_batches(source, windows=windows, micro_batch_size=4, rank=rank, ranks=ranks))
        for rank in range(ranks)
    ]
    assert len({len(batches) for batches in by_rank}) == 1  # a sharded model runs on all ranks together
    assert {tuple(b["tokens"].shape) for batches in by_rank for b in batches} == {(4, 16)}
    counted = [row for batches in by_rank for b in batches for row in b["targets"][b["loss_mask"].all(1)].tolist()]
    expected = [source.example(k)["targets"].tolist() for k in range(min(windows, source.num_windows))]
    assert sorted(counted) == sorted(expected)
    blank = sum(int((~b["loss_mask"]).sum()) for batches in by_rank for b in batches)
    assert blank == 16 * (sum(len(batches) for batches in by_rank) * 4 - len(expected))
