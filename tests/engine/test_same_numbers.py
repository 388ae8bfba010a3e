"""Every layout and engine gives the losses, gradient norms, gradients and weights of one process."""

from __future__ import annotations

from functools import cache

import pytest

from tests.distributed import run_ranks
from tests.engine import harness
from tests.engine.harness import Case, Trace

FAST: dict[str, tuple[int, Case]] = {
    "tp": (2, Case({"tp": 2}, micro_batch=4)),
    "tp, sequence parallel": (2, Case({"tp": 2, "sequence_parallel": True}, micro_batch=4)),
    "dp, nothing sharded": (2, Case(engine={"shard": "none"})),
    "dp, optimizer": (2, Case(engine={"shard": "optimizer"})),
    "dp, full": (2, Case(engine={"shard": "full"})),
    "dp, cpu offload": (2, Case(engine={"cpu_offload": True})),
    "dp x tp": (4, Case({"tp": 2, "sequence_parallel": True})),
    "hsdp": (4, Case({"dp_replicate": 2})),
    "zero 1": (2, Case(engine={"kind": "deepspeed", "zero_stage": 1})),
    "zero 2": (2, Case(engine={"kind": "deepspeed", "zero_stage": 2})),
    "zero 3": (2, Case(engine={"kind": "deepspeed", "zero_stage": 3})),
    "zero 1 x tp": (4, Case({"tp": 2}, {"kind": "deepspeed", "zero_stage": 1})),
    "zero 2 x tp": (4, Case({"tp": 2}, {"kind": "deepspeed", "zero_stage": 2})),
    "zero 3 x tp": (4, Case({"tp": 2, "sequence_parallel": True}, {"kind": "deepspeed", "zero_stage": 3})),
    "zero 1, optimizer on the cpu": (2, Case(engine={"kind": "deepspeed", "zero_stage": 1, "offload_optimizer": True})),
    "zero 3, optimizer on the cpu": (2, Case(engine={"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": True})),
    "zero 2 in one process": (1, Case(engine={"kind": "deepspeed", "zero_stage": 2})),
}


def train(rank: int, world_size: int, case: Case, steps: int = harness.STEPS, bug: str | None = None) -> Trace:
    return harness.train(rank, world_size, case, steps=steps, bug=bug)


@cache
def one_process() -> list[Trace]:
    return [harness.train(0, 1, Case(micro_batch=4))]


@pytest.mark.parametrize("name", FAST)
def test_as_one_process(name: str) -> None:
    world_size, case = FAST[name]
    assert harness.differences(one_process(), run_ranks(world_size, train, case, timeout=180)) == []
