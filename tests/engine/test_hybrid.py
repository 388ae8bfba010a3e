"""Mamba-2/attention hybrids on every engine: as one process, across checkpoints, in bf16; and planted bugs that only a cut layer has.

Tensor and sequence parallelism by themselves, and recompute, are in tests/parallel/test_parallelize.py.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.models.mamba import GatedGroupNorm, Mamba2, StateSpace
from megatron_lite.models.scan import Past
from tests.distributed import run_ranks
from tests.engine import harness
from tests.engine.harness import Case, Trace

HYBRID: dict[str, Any] = {
    "num_layers": None, "pattern": "M-*M", "norm": "rmsnorm", "rope.fraction": 0.0, "mamba.heads": 8, "mamba.head_dim": 4,
    "mamba.groups": 4, "mamba.state": 8,
}  # fmt: skip
SEQUENCE = {"tp": 2, "sequence_parallel": True}


def zero(stage: int, *, offload: bool = False) -> dict[str, object]:
    return {"kind": "deepspeed", "zero_stage": stage, "offload_optimizer": offload}


def hybrid(parallel: dict[str, Any] | None = None, engine: dict[str, Any] | None = None, **more: Any) -> Case:
    return Case(parallel or {}, engine or {}, model=HYBRID, **more)


FAST = {
    "dp, full": (2, hybrid(micro_batch=1)),
    "zero 3": (2, hybrid(engine=zero(3))),
    "dp x tp, sequence parallel, recompute": (4, hybrid({**SEQUENCE, "recompute": "selective"})),
}
SLOW = {
    "dp, nothing sharded": (2, hybrid(engine={"shard": "none"})),
    "dp, cpu offload": (2, hybrid(engine={"shard": "optimizer", "cpu_offload": True})),
    "zero 1 x tp": (4, hybrid({"tp": 2}, zero(1))),
    "zero 2": (2, hybrid(engine=zero(2), micro_batch=1)),
    "zero 3 x tp, sequence parallel": (4, hybrid(SEQUENCE, zero(3))),
    "zero 3, optimizer on the cpu, recompute": (2, hybrid({"recompute": "full"}, zero(3, offload=True))),
    "hsdp": (4, hybrid({"dp_replicate": 2})),
    "tp 4, sequence parallel, recompute": (
        4,
        hybrid({"tp": 4, "sequence_parallel": True, "recompute": "full"}, micro_batch=4),
    ),
}
STEPS = 5


def train(rank: int, world_size: int, case: Case, steps: int = STEPS, bug: str = "") -> Trace:
    with pytest.MonkeyPatch.context() as patch:
        plant(bug, patch)
        return harness.train(rank, world_size, case, steps=steps)


@cache
def one_process(bug: str = "") -> list[Trace]:
    return [train(0, 1, hybrid(micro_batch=4), STEPS, bug)]


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_as_one_process(name: str) -> None:
    world_size, case = (FAST | SLOW)[name]
    traces = run_ranks(world_size, train, case)
    assert harness.differences(one_process(), traces) == []
    wanted, got = (harness.assemble([trace.boxes["start"] for trace in side]) for side in (one_process(), traces))
    assert all(torch.equal(tensor, got[name]) for name, tensor in wanted.items())


# ---------------------------------------------------------------- planted bugs


def plant(bug: str, patch: pytest.MonkeyPatch) -> None:
    """Mathematics that is right on one process and wrong on a shard."""
    if bug == "plain column split of in_proj":
        patch.setattr(Mamba2, "forward", plain_rows)
    elif bug == "norm over all groups":
        patch.setattr(GatedGroupNorm, "forward", norm_over_all)
    else:
        assert bug == "", bug


def plain_rows(self: Mamba2, x_BTD: Tensor, context: Any) -> Tensor:
    """The rows of `in_proj` and the channels in Hugging Face's order: all z, then all x, all B, all C, all dt."""
    groups = self.in_proj.weight.shape[0] // sum(self.gate_and_rest)
    gate, mixed, dt = self.in_proj(x_BTD).split([groups * size for size in self.gate_and_rest], dim=2)
    mixed, _ = self.conv(mixed, None, context.documents_BT)
    x, B, C = F.silu(mixed).split([groups * size for size in self.values_and_rest], dim=2)
    B, C = B.unflatten(2, (groups, -1)), C.unflatten(2, (groups, -1))
    y, _ = self.ssm(x.unflatten(2, (-1, self.head_dim)), dt, B, C, Past(documents_BT=context.documents_BT))
    return self.out_proj(self.norm(*(tensor.reshape(*y.shape[:2], groups, -1) for tensor in (y, gate)))), None


def norm_over_all(self: GatedGroupNorm, y: Tensor, gate: Tensor) -> Tensor:
    return F.rms_norm((y * F.silu(gate)).flatten(-2), self.weight.shape, self.weight, self.eps)


@pytest.mark.parametrize("bug", ["plain column split of in_proj", "norm over all groups"])
def test_a_planted_bug_is_found(bug: str) -> None:
    traces = run_ranks(2, train, hybrid({"tp": 2}, micro_batch=4), 1, bug)
    assert harness.differences(one_process(bug), traces) != []


# ---------------------------------------------------------------- checkpoints


def save(rank: int, world_size: int, case: Case, directory: str) -> Trace:
    return harness.save_after(rank, world_size, case, directory, step=2, stop=4)


def resume(rank: int, world_size: int, case: Case, directory: str) -> Trace:
    return harness.resume_from(rank, world_size, case, directory, step=2, stop=4)


def test_a_checkpoint_goes_on_elsewhere(tmp_path) -> None:
    wrote = run_ranks(2, save, hybrid(SEQUENCE, micro_batch=4), str(tmp_path))
    read = run_ranks(2, resume, hybrid(engine=zero(3)), str(tmp_path))
    wanted = harness.assemble([trace.boxes["saved"] for trace in wrote])
    got = harness.assemble([trace.boxes["loaded"] for trace in read])
    assert wanted.keys() == got.keys()
    assert all(torch.equal(tensor, got[name]) for name, tensor in wanted.items())
    for one, other in ((wrote[0].losses, read[0].losses), (wrote[0].norms, read[0].norms)):
        assert other == pytest.approx(one[2:], rel=harness.TOLERANCE)


# ---------------------------------------------------------------- bf16


def in_bf16(rank: int, world_size: int, case: Case) -> tuple[list[float], list[float], set[str]]:
    """Losses, norms, and the dtypes of the recurrence's own parameters as its forward sees them."""
    seen: set[str] = set()
    right = StateSpace.forward

    def watched(self: StateSpace, *args: Any, **kwargs: Any) -> Any:
        seen.update(str(parameter.dtype) for parameter in (self.A_log, self.dt_bias, self.D))
        return right(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("error", "FSDP2-wrapped module")  # that it returned a view
        patch.setattr(StateSpace, "forward", watched)
        trace = harness.train(rank, world_size, case, steps=2)
    return trace.losses, trace.norms, seen


@cache
def one_process_in_bf16() -> tuple[list[float], list[float], set[str]]:
    return in_bf16(0, 1, hybrid(precision="bf16", micro_batch=1))


# Data-parallel ranks round nothing that one process does not; DeepSpeed rounds the gradients of the fp32 parameters. Tensor-parallel
# partial sums are rounded to bf16 before they are added, which is compared in step 1 (tests/engine/test_bf16.py).
@pytest.mark.parametrize(
    ("parallel", "engine", "tolerance"),
    [({}, {}, 1e-5), ({"recompute": "selective"}, {}, 1e-5), ({}, zero(3), 1e-4), (SEQUENCE, {}, 1e-3)],
    ids=["dp, full", "dp, full, recompute", "zero 3", "tp, sequence parallel"],
)
def test_bf16(parallel: dict[str, Any], engine: dict[str, Any], tolerance: float) -> None:
    losses, norms, seen = one_process_in_bf16()
    assert seen == {"torch.float32"}
    steps = 1 if parallel else 2
    for got in run_ranks(2, in_bf16, hybrid(parallel, engine, precision="bf16", micro_batch=1)):
        assert got[0][:steps] == pytest.approx(losses[:steps], rel=tolerance)
        assert got[1][:steps] == pytest.approx(norms[:steps], rel=10 * tolerance)
        assert got[2] == {"torch.float32"}
