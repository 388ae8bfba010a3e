"""Copies of one parameter stay equal where reductions of different ranks differ in the last digit; larger differences are named."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.distributed import RanksFailed, run_ranks
from tests.engine import harness
from tests.engine.harness import Boxes, Case

SEQUENCE = {"tp": 2, "sequence_parallel": True}
ULP, WRONG = 1 + 1.2e-7, 1.01


def off_on_the_last_rank(rank: int, world_size: int, engine: Any, factor: float) -> None:
    """What `engine` reduced on the last rank alone, multiplied by `factor`, if every tensor-parallel rank holds it."""
    if rank < world_size - 1:
        return
    copies = engine.replicas.names
    if hasattr(engine, "_take_gradients"):
        right = engine._take_gradients
        engine._take_gradients = lambda: {n: g * factor if n in copies else g for n, g in right().items()}
    else:
        right_state = engine._whole
        engine._whole = lambda kind, name: right_state(kind, name) * (factor if name in copies else 1.0)


def train_apart(rank: int, world_size: int, case: Case, factor: float) -> Boxes:
    engine, place, places = harness.open_engine(case, world_size)
    off_on_the_last_rank(rank, world_size, engine, factor)
    for step in (1, 2, 3):
        engine.train_step(harness.micro_batches(step, rank=place, ranks=places, size=4), lr=1e-3)
    return harness.boxes(engine, "")


CASES = {"fsdp": Case(SEQUENCE), "deepspeed": Case(SEQUENCE, {"kind": "deepspeed", "zero_stage": 2})}


@pytest.mark.parametrize("engine", CASES)
def test_a_last_digit_between_tensor_parallel_ranks_is_taken_from_the_first(engine: str) -> None:
    harness.assemble(run_ranks(2, train_apart, CASES[engine], ULP))  # fails where ranks hold different bits


@pytest.mark.parametrize("engine", CASES)
def test_a_larger_difference_fails_on_every_rank_with_the_name(engine: str) -> None:
    with pytest.raises(RanksFailed) as caught:
        run_ranks(2, train_apart, CASES[engine], WRONG)
    assert str(caught.value).count("RuntimeError: ") == 2
    assert re.search(r"'layers\.\S+(norm\.weight|bias)' differed", str(caught.value))  # all copies are off by as much
    assert "1.0e-02" in str(caught.value)


def train_replicas(rank: int, world_size: int) -> tuple[list[float], Boxes]:
    """The last rank's own share of the gradient norm is off, by enough to move the last digits of the whole."""
    engine, place, places = harness.open_engine(Case({"dp_replicate": 2, "tp": 2}), world_size)
    if rank == world_size - 1:
        right = engine._global_norm
        engine._global_norm = lambda gradients: right({name: g * (1 + 1e-5) for name, g in gradients.items()})
    norms = []
    for step in (1, 2, 3):
        result = engine.train_step(harness.micro_batches(step, rank=place, ranks=places, size=4), lr=1e-3)
        norms.append(result.grad_norm.item())
    return norms, harness.boxes(engine, "")


def test_replicas_clip_by_the_same_bits() -> None:
    results = run_ranks(4, train_replicas)
    assert all(norms == results[0][0] for norms, _ in results)
    harness.assemble([boxes for _, boxes in results])
    assert min(results[0][0]) > harness.CLIP


def test_a_gradient_that_is_not_finite_is_not_taken_for_a_difference() -> None:
    """The step is left out instead, on every rank."""
    for skipped in run_ranks(2, skips, CASES["fsdp"]):
        assert skipped == [1.0, 0.0]


def skips(rank: int, world_size: int, case: Case) -> list[float]:
    engine, place, places = harness.open_engine(case, world_size)
    right, results = engine._take_gradients, []
    for factor in (torch.nan, 1.0):
        engine._take_gradients = lambda factor=factor: {name: g * factor for name, g in right().items()}
        result = engine.train_step(harness.micro_batches(1, rank=place, ranks=places, size=4), lr=1e-3)
        results.append(result.skipped.item())
    engine.state()
    return results
