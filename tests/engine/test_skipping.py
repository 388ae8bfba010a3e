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


def bad_step(rank: int, world_size: int, case: Case, where: str) -> dict[str, Any]:
    """A good step, a step in which only the last rank meets something that is not finite, and a good step again."""
    engine, place, places = harness.open_engine(case, world_size)
    objective = engine.objective
    right = type(objective).forward
    results, states = [], []
    for step, bad in ((1, False), (2, True), (2, False)):
        if bad and rank == world_size - 1:
            type(objective).forward = lambda self, batch: broken(right(self, batch), where)
        batches = harness.micro_batches(step, rank=place, ranks=places, size=2)
        results.append(engine.train_step(batches, lr=1e-3, judge=judge))
        type(objective).forward = right
        states.append((engine.state().counters["adam_step"], harness.boxes(engine, "")))
    return {
        "skipped": [result.skipped.item() for result in results],
        "losses": [result.loss.item() for result in results],
        "adam_steps": [step for step, _ in states],
        "unchanged": all(torch.equal(box[2], states[1][1][name][2]) for name, box in states[0][1].items()),
        "changed": any(not torch.equal(box[2], states[2][1][name][2]) for name, box in states[0][1].items()),
    }


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


@pytest.mark.parametrize("where", ["loss", "gradient", "spike"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "zero 2" in name else []) for name in CASES]
)
def test_nothing_moves(name: str, where: str) -> None:
    for result in run_ranks(2, bad_step, CASES[name], where):
        assert result["skipped"] == [0, 1, 0]
        assert result["adam_steps"] == [1, 1, 2]
        assert result["unchanged"]
        assert result["changed"]
        assert torch.isfinite(torch.tensor(result["losses"][2]))
