"""A step whose judge says so, as of a loss or gradient that is not finite, changes nothing, on every rank and in every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_lite.objectives.base import Loss
from megatron_lite.optim.spikes import not_finite
from tests.distributed import run_ranks
from tests.engine import harness
from tests.engine.harness import Case

BAD = ["", "loss", "", "gradient", "", "spike", ""]  # what goes wrong in each step, on the last rank only


def bad_steps(rank: int, world_size: int, case: Case) -> list[dict[str, Any]]:
    """Of every step of `BAD` what came of it."""
    engine, place, places = harness.open_engine(case, world_size)
    objective = engine.objective
    right = type(objective).forward
    found, before = [], harness.boxes(engine, "")
    for step, where in enumerate(BAD, 1):
        if where and rank == world_size - 1:
            type(objective).forward = lambda self, batch, where=where: broken(right(self, batch), where)
        batches = harness.micro_batches(step, rank=place, ranks=places, size=2)
        result = engine.train_step(batches, lr=1e-3, judge=judge)
        type(objective).forward = right
        after = harness.boxes(engine, "")
        found.append({
            "skipped": bool(result.skipped.item()),
            "finite": bool(result.loss.isfinite()),
            "adam_step": engine.state().counters["adam_step"],
            "unchanged": all(torch.equal(box[2], after[name][2]) for name, box in before.items()),
        })  # fmt: skip
        before = after
    return found


def judge(loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
    return torch.maximum(not_finite(loss, grad_norm), (grad_norm > 1000).float())


def broken(loss: Loss, where: str) -> Loss:
    total = loss.total
    if where == "spike":
        return loss._replace(total=total + 1e6 * (total - total.detach()))
    if where == "loss":
        return loss._replace(total=total + torch.inf)
    return loss._replace(
        total=total + 0 * (total - total.detach()).abs().sqrt()
    )  # 0 * (derivative of a root at 0): NaN


CASES = {
    "fsdp": Case(),
    "zero 1": Case(engine={"kind": "deepspeed", "zero_stage": 1}),
    "zero 2": Case(engine={"kind": "deepspeed", "zero_stage": 2}),
    "zero 3": Case(engine={"kind": "deepspeed", "zero_stage": 3}),
    "zero 1, bf16": Case(engine={"kind": "deepspeed", "zero_stage": 1}, precision="bf16"),
    "zero 2, bf16": Case(engine={"kind": "deepspeed", "zero_stage": 2}, precision="bf16"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "zero 2" in name else []) for name in CASES]
)
def test_nothing_moves(name: str) -> None:
    for steps in run_ranks(2, bad_steps, CASES[name]):
        for number, (where, step) in enumerate(zip(BAD, steps, strict=True)):
            assert (step["skipped"], step["unchanged"]) == (bool(where), bool(where)), (number, where)
            assert step["adam_step"] == number // 2 + 1
            assert step["finite"] or where
