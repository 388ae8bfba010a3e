"""Every layout and engine gives the losses, gradient norms, gradients and weights of one process."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_lite.engine.fsdp import sum_of_squares
from tests.distributed import RanksFailed, run_ranks
from tests.engine import harness
from tests.engine.bugs import BUGS
from tests.engine.harness import Case, Trace


def zero(stage: int, *, offload: bool = False) -> dict[str, object]:
    return {"kind": "deepspeed", "zero_stage": stage, "offload_optimizer": offload}


SEQUENCE = {"tp": 2, "sequence_parallel": True}
TIED = {"tie_embeddings": True, "norm": "rmsnorm", "mlp.activation": "swiglu", "attention.kv_heads": 2}

FAST: dict[str, tuple[int, Case]] = {
    "tp, sequence parallel": (2, Case(SEQUENCE, micro_batch=4)),
    "dp, nothing sharded": (2, Case(engine={"shard": "none"})),
    "dp, full": (2, Case(engine={"shard": "full"}, micro_batch=1)),
    "dp, cpu offload": (2, Case(engine={"cpu_offload": True})),
    "zero 1": (2, Case(engine=zero(1))),
    "zero 2": (2, Case(engine=zero(2), micro_batch=1)),
    "zero 3": (2, Case(engine=zero(3))),
    "dp x tp": (4, Case(SEQUENCE)),
    "zero 3 x tp": (4, Case({"tp": 2}, zero(3))),
}
# What the combinations of tests/training/test_support.py do not hold to gradients and weights over many steps.
SLOW: dict[str, tuple[int, Case]] = {
    "zero 3, optimizer on the cpu": (2, Case(engine=zero(3, offload=True))),
    "dp x tp, nothing sharded": (4, Case({"tp": 2}, {"shard": "none"}, micro_batch=1)),
    "tp 4, sequence parallel": (4, Case({"tp": 4, "sequence_parallel": True}, micro_batch=4)),
    "hsdp, nothing sharded": (4, Case({"dp_replicate": 4}, {"shard": "none"})),
    "hsdp x tp": (4, Case({"dp_replicate": 2, **SEQUENCE}, {"shard": "optimizer"})),
    "zero 2 x tp": (4, Case(SEQUENCE, zero(2))),
    "zero 3 x tp, sequence parallel": (4, Case(SEQUENCE, zero(3), micro_batch=1)),
    "zero 3 in one process": (1, Case(engine=zero(3))),
    "tp, recompute selective": (2, Case({"tp": 2, "recompute": "selective"}, micro_batch=4)),
    "zero 3, recompute full": (2, Case({"recompute": "full"}, zero(3))),
    "tied, zero 2 x tp": (4, Case({"tp": 2}, zero(2), model=TIED)),
}


def train(rank: int, world_size: int, case: Case, steps: int = harness.STEPS, bug: str | None = None) -> Trace:
    return harness.train(rank, world_size, case, steps=steps, bug=bug)


LARGE = Case(model={"vocab_size": 16000, "hidden_size": 64, "attention.head_dim": 16}, micro_batch=4)


@pytest.mark.parametrize("engine", [{}, zero(2)], ids=["fsdp", "zero 2"])
def test_norms_of_large_matrices(engine: dict[str, object]) -> None:
    """A million numbers: summed one by one in fp32 they would differ by 1e-4 from the same in two halves."""
    alone = harness.train(0, 1, LARGE, steps=2)
    for trace in run_ranks(2, train, replace(LARGE, engine=engine), 2):
        assert trace.norms == pytest.approx(alone.norms, rel=harness.TOLERANCE)


@pytest.mark.parametrize("rows", [0, 1, 60_000])
def test_sum_of_squares(rows: int) -> None:
    matrix = torch.full((rows, 70), 1e-3)
    matrix[::97] = 3.0
    assert sum_of_squares([matrix, torch.ones(3)]).item() == pytest.approx(
        matrix.double().square().sum().item() + 3, rel=1e-6
    )


@cache
def one_process(tied: bool = False) -> list[Trace]:
    return [harness.train(0, 1, Case(model=TIED if tied else {}, micro_batch=4))]


def check(world_size: int, case: Case, steps: int) -> None:
    traces = run_ranks(world_size, train, case, steps)
    reference = one_process(case.model == TIED)
    assert harness.differences(reference, traces) == []
    wanted, got = (harness.assemble([trace.boxes["start"] for trace in side]) for side in (reference, traces))
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, got[name]), f"initial {name}"


@pytest.mark.parametrize("name", FAST)
def test_as_one_process(name: str) -> None:
    """Over 20 steps on one layout of each engine. Step 1 compares every gradient, so 5 steps find a bug on the others."""
    check(*FAST[name], steps=harness.STEPS if name in ("dp x tp", "zero 3") else 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_as_one_process(name: str) -> None:
    check(*SLOW[name], steps=5)


@pytest.mark.parametrize(
    "case", [Case(SEQUENCE, micro_batch=4), Case(), Case(engine=zero(2))], ids=["tp", "dp", "zero 2"]
)
def test_the_same_layout_twice_gives_the_same_bits(case: Case) -> None:
    first, second = (run_ranks(2, train, case, 5) for _ in range(2))
    for one, other in zip(first, second):
        assert (one.losses, one.norms) == (other.losses, other.norms)
        for name, (_, _, tensor) in one.boxes["end"].items():
            assert torch.equal(tensor, other.boxes["end"][name][2]), name


def collectives(rank: int, world_size: int, prefix: str, case: Case) -> int:
    engine, place, places = harness.open_engine(case, world_size)
    batches = harness.micro_batches(1, rank=place, ranks=places, size=case.micro_batch)
    with profile(activities=[ProfilerActivity.CPU]) as watch:
        engine.train_step(batches, lr=1e-3)
    return sum(event.name().startswith(prefix) for event in watch.profiler.kineto_results.events())


def test_gradients_travel_once_a_step() -> None:
    """Four micro-batches reduce their gradients as often as one does."""
    (one, _), (four, _) = (
        run_ranks(2, collectives, "c10d::_reduce_scatter", Case(micro_batch=size)) for size in (4, 1)
    )
    assert one == four > 0


@pytest.mark.parametrize(
    ("shard", "micro_batch", "gathers"),
    [("full", 4, 2 * 4 + 3), ("full", 2, 2 * (2 * 4 + 3)), ("optimizer", 4, 4 + 3), ("optimizer", 1, 4 + 3)],
)
def test_how_often_weights_are_gathered(shard: str, micro_batch: int, gathers: int) -> None:
    """`full`: the four layers for forward and for backward, embedding, head and final norm once, for each micro-batch.
    `optimizer`: each once a step."""
    case = Case(engine={"shard": shard}, micro_batch=micro_batch)
    assert run_ranks(2, collectives, "c10d::_allgather_base", case) == [gathers, gathers]


def in_turn(rank: int, world_size: int, case: Case) -> list[str]:
    """Which groups are gathered and reduced in a step, in the order in which it is asked for."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    engine, place, places = harness.open_engine(case, world_size)
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, word in (("foreach_all_gather", "gather"), ("foreach_reduce", "reduce")):
            right = getattr(groups, name)
            patch.setattr(groups, name, lambda params, *a, right=right, word=word, **k: (
                seen.append(f"{word} {params[0]._module_info.module.__class__.__name__}"), right(params, *a, **k)
            )[1])  # fmt: skip
        engine.train_step(harness.micro_batches(1, rank=place, ranks=places, size=case.micro_batch), lr=1e-3)
    return seen


def test_the_head_is_reduced_first_and_the_embedding_gathered_before_it() -> None:
    for seen in run_ranks(2, in_turn, Case(engine={"shard": "optimizer"}, micro_batch=4)):
        gathers = [name for name in seen if name.startswith("gather")]
        assert gathers.index("gather FSDPEmbedding") < gathers.index("gather FSDPLinear") == len(gathers) - 1, seen
        assert next(name for name in seen if name.startswith("reduce")) == "reduce FSDPLinear", seen


def local_elements(rank: int, world_size: int, case: Case) -> int:
    engine, _, _ = harness.open_engine(case, world_size)
    return sum(piece.local.numel() for piece in engine.state().tensors.values())


def test_what_a_rank_keeps() -> None:
    """`none` keeps everything on every rank, the other modes half of it (all sizes here are even)."""
    none, optimizer, full = (
        run_ranks(2, local_elements, Case(engine={"shard": shard})) for shard in ("none", "optimizer", "full")
    )
    assert none[0] == none[1] == 2 * full[0]
    assert optimizer == full


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("engine", [{}, zero(1)], ids=["fsdp", "deepspeed"])
def test_a_planted_bug_is_found(bug: str, engine: dict[str, object]) -> None:
    """The harness would notice: each of these hides behind Adam in a plain look at the losses."""
    if "not reduced" in bug:  # what differs between tensor-parallel ranks is found by the engine itself
        with pytest.raises(RanksFailed, match=r"norm.*' differed between tensor-parallel ranks"):
            run_ranks(2, train, Case(SEQUENCE, engine, micro_batch=4), 3, bug)
        return
    traces = run_ranks(2, train, Case(SEQUENCE, engine, micro_batch=4), 3, bug)
    assert harness.differences(one_process(), traces) != []
