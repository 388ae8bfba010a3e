"""A checkpoint of any layout and engine goes on at any other: weights, moments and step bitwise, losses as if nothing happened."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.engine import harness
from tests.engine.harness import Case, Trace

SAVED, STOP = 3, 6

LAYOUTS: dict[str, tuple[int, Case]] = {
    "one process": (1, Case(micro_batch=4)),
    "tp": (2, Case({"tp": 2, "sequence_parallel": True}, micro_batch=4)),
    "dp": (2, Case()),
    "dp, nothing sharded": (2, Case(engine={"shard": "none"})),
    "dp, cpu offload": (2, Case(engine={"cpu_offload": True})),
    "zero 1": (2, Case(engine={"kind": "deepspeed", "zero_stage": 1})),
    "zero 2": (2, Case(engine={"kind": "deepspeed", "zero_stage": 2})),
    "zero 3": (2, Case(engine={"kind": "deepspeed", "zero_stage": 3})),
    "zero 1, optimizer on the cpu": (2, Case(engine={"kind": "deepspeed", "offload_optimizer": True})),
    "zero in one process": (1, Case(engine={"kind": "deepspeed", "zero_stage": 2})),
    "dp x tp": (4, Case({"tp": 2})),
    "hsdp": (4, Case({"dp_replicate": 2})),
    "dp 4": (4, Case()),
    "tp 4": (4, Case({"tp": 4}, micro_batch=4)),
    "cp": (2, Case({"cp": 2}, micro_batch=4)),
    "cp x dp": (4, Case({"cp": 2})),
    "cp x tp": (4, Case({"cp": 2, "tp": 2, "sequence_parallel": True}, micro_batch=4)),
    "zero 1 x tp": (4, Case({"tp": 2}, {"kind": "deepspeed", "zero_stage": 1})),
    "zero 3 x tp": (4, Case({"tp": 2}, {"kind": "deepspeed", "zero_stage": 3})),
    "zero 3 over 4": (4, Case(engine={"kind": "deepspeed", "zero_stage": 3})),
}
FAST = [("dp", "zero 2"), ("zero 2", "zero 3"), ("zero 3", "tp"), ("tp", "zero 1"), ("cp x dp", "dp x tp")]


def save(rank: int, world_size: int, case: Case, directory: str) -> Trace:
    return harness.save_after(rank, world_size, case, directory, step=SAVED, stop=STOP)


def resume(rank: int, world_size: int, case: Case, directory: str) -> Trace:
    return harness.resume_from(rank, world_size, case, directory, step=SAVED, stop=STOP)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """Layout -> (directory of its checkpoint, what the ranks that saved it saw), each trained once."""
    done: dict[tuple[str, str], tuple[Path, list[Trace]]] = {}

    def get(name: str, precision: str = "fp32") -> tuple[Path, list[Trace]]:
        if (name, precision) not in done:
            directory = tmp_path_factory.mktemp("checkpoints")
            world_size, case = LAYOUTS[name]
            case = Case(case.parallel, case.engine, precision, micro_batch=case.micro_batch)
            done[name, precision] = directory, run_ranks(world_size, save, case, str(directory))
        return done[name, precision]

    return get


def check(saved, before: str, after: str, precision: str = "fp32") -> None:
    directory, wrote = saved(before, precision)
    world_size, case = LAYOUTS[after]
    case = Case(case.parallel, case.engine, precision, micro_batch=case.micro_batch)
    read = run_ranks(world_size, resume, case, str(directory))
    wanted = harness.assemble([trace.boxes["saved"] for trace in wrote])
    got = harness.assemble([trace.boxes["loaded"] for trace in read])
    assert wanted.keys() == got.keys()
    assert {key.split(".")[0] for key in wanted} == {"model", "exp_avg", "exp_avg_sq"}
    for name, tensor in wanted.items():
        assert torch.equal(tensor, got[name]), name
    tolerance = {"fp32": harness.TOLERANCE, "bf16": 2e-2}[precision]  # bf16: 2^-8 in a reordered sum
    for one, other in ((wrote[0].losses, read[0].losses), (wrote[0].norms, read[0].norms)):
        assert other == pytest.approx(one[SAVED:], rel=tolerance)


@pytest.mark.parametrize(("before", "after"), FAST)
def test_goes_on_elsewhere(saved, before: str, after: str) -> None:
    check(saved, before, after)


def test_bf16_keeps_fp32_master_weights(saved) -> None:
    check(saved, "dp", "zero 3", "bf16")


@pytest.mark.parametrize("name", ["dp", "zero 3", "cp x dp"])
def test_the_same_layout_goes_on_with_the_same_bits(saved, name: str) -> None:
    directory, wrote = saved(name)
    world_size, case = LAYOUTS[name]
    read = run_ranks(world_size, resume, case, str(directory))
    assert (read[0].losses, read[0].norms) == (wrote[0].losses[SAVED:], wrote[0].norms[SAVED:])


@pytest.mark.slow
@pytest.mark.parametrize("before", LAYOUTS)
def test_drawn_from_the_matrix(saved, before: str) -> None:
    """Every layout saves once and is resumed at a drawn one, half of them in bf16."""
    draw = random.Random(before)
    check(saved, before, draw.choice(sorted(LAYOUTS)), draw.choice(["fp32", "bf16"]))
