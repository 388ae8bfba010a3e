"""Hymba on every engine: meta tokens, windows, keys shared over layers, and parameters that never decay.

Tensor and sequence parallelism by themselves, and recompute, are in tests/parallel/test_parallelize.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from megatron_lite.models.hymba import SelectiveStateSpace
from megatron_lite.models.meta_tokens import PrefixedEmbedding
from tests.distributed import run_ranks
from tests.engine import harness
from tests.engine.harness import Case, Trace

HYMBA: dict[str, Any] = {
    "num_layers": None, "pattern": "H-HH", "norm": "rmsnorm", "tie_embeddings": True, "meta_tokens": 4, "linear_bias": False,
    "attention.value_head_dim": 16, "attention.window": 6, "attention.always_visible": 4, "attention.global_layers": [0],
    "attention.kv_groups": [[1, 2]], "mamba.version": 1, "mamba.heads": 4, "mamba.head_dim": 16, "mamba.state": 4,
    "mamba.dt_rank": 2,
}  # fmt: skip
SEQUENCE = {"tp": 2, "sequence_parallel": True}
STATES = {
    "embedding.meta_tokens",
    *(f"layers.{i}.mixer.ssm.{name}" for i in (0, 2, 3) for name in ("A_log", "dt_bias", "D")),
}


def hymba(parallel: dict[str, Any] | None = None, engine: dict[str, Any] | None = None, **more: Any) -> Case:
    return Case(parallel or {}, engine or {}, model=HYMBA, **more)


FAST = {
    "dp, full, recompute": (2, hymba({"recompute": "full"}, micro_batch=1)),
    "dp x tp, sequence parallel, recompute": (4, hymba({**SEQUENCE, "recompute": "selective"})),
    "zero 3": (2, hymba(engine={"kind": "deepspeed", "zero_stage": 3})),
}
SLOW = {
    "zero 1 x tp": (4, hymba({"tp": 2}, {"kind": "deepspeed", "zero_stage": 1})),
    "hsdp": (4, hymba({"dp_replicate": 2})),
    "tp 4, sequence parallel": (4, hymba({"tp": 4, "sequence_parallel": True, "recompute": "full"}, micro_batch=4)),
}
STEPS = 4


def train(rank: int, world_size: int, case: Case) -> Trace:
    return harness.train(rank, world_size, case, steps=STEPS)


@cache
def one_process() -> list[Trace]:
    return [train(0, 1, hymba(micro_batch=4))]


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_as_one_process(name: str) -> None:
    world_size, case = (FAST | SLOW)[name]
    traces = run_ranks(world_size, train, case)
    assert harness.differences(one_process(), traces) == []
    wanted, got = (harness.assemble([trace.boxes["start"] for trace in side]) for side in (one_process(), traces))
    assert all(torch.equal(tensor, got[name]) for name, tensor in wanted.items())


def decaying() -> set[str]:
    """Names of the parameters that an engine's optimizer lets decay."""
    engine, _, _ = harness.open_engine(hymba(), 1)
    (decay, names), _ = engine.optimizer.groups
    assert decay == 0.5
    return set(names)


def test_meta_tokens_and_the_recurrences_parameters_never_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    found = decaying()
    assert {"layers.0.mixer.in_proj.weight", "layers.0.mixer.select.x_proj.weight"} <= found
    assert not found & STATES
    assert not any("norm" in name for name in found)
    monkeypatch.delattr(SelectiveStateSpace, "kinds")  # what a module says nothing about decays
    monkeypatch.setattr(PrefixedEmbedding, "kinds", {"weight": "embedding"})
    assert decaying() & STATES == STATES


def in_bf16(rank: int, world_size: int, case: Case) -> tuple[list[float], list[float]]:
    trace = harness.train(rank, world_size, case, steps=1)
    return trace.losses, trace.norms


# Tensor-parallel partial sums are rounded to bf16 before they are added; data-parallel ranks round nothing that one process does not.
@pytest.mark.parametrize(
    ("parallel", "tolerance"), [({}, 1e-5), (SEQUENCE, 1e-3)], ids=["full", "tp, sequence parallel"]
)
def test_bf16(parallel: dict[str, Any], tolerance: float) -> None:
    expected = in_bf16(0, 1, hymba(precision="bf16", micro_batch=1))
    for losses, norms in run_ranks(2, in_bf16, hymba(parallel, precision="bf16", micro_batch=1)):
        assert losses == pytest.approx(expected[0], rel=tolerance)
        assert norms == pytest.approx(expected[1], rel=10 * tolerance)
