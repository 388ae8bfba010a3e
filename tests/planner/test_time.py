"""What travels, what overlaps and how long it takes: by hand, and against published trainings."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.plan_published import NEMOTRON, PUBLISHED, error, fitted, lines, predicted, predictions
from megatron_lite.hardware import gpu_named
from megatron_lite.parallel.mesh import Degrees
from megatron_lite.planner.time import DEFAULT, Clock, UnitPass, overlapped
from megatron_lite.planner.traffic import PROTOCOLS, Collective, Group, flows, group_of
from megatron_lite.planner.work import units_of
from megatron_lite.training.config import compose_run
from megatron_lite.training.planning import job_of

H100 = gpu_named("h100")


def test_groups_lie_where_the_ranks_do():
    degrees = Degrees(dp_replicate=4, dp_shard=6, tp=4)  # 96 ranks
    assert group_of(degrees, "tp", 8) == Group(4, 1)
    assert group_of(degrees, "dp_shard", 8) == Group(6, 3)  # two in a node
    assert group_of(degrees, "dp_replicate", 8) == Group(4, 4)
    assert group_of(degrees, "world", 8) == Group(96, 12)
    assert group_of(Degrees(dp_shard=4), "dp_shard", 8) == Group(4, 1)


def test_a_large_collective_takes_its_bytes_over_the_slower_link():
    size = 8e9
    in_node = Collective(size, Group(8, 1)).seconds(H100, link=1.0, network=1.0)
    assert in_node == pytest.approx(size * 7 / 8 / 450e9, rel=1e-2)
    alone = Collective(size, Group(8, 8)).seconds(H100, link=1.0, network=1.0)  # one card a node
    assert alone == pytest.approx(size * 7 / 8 / 50e9, rel=1e-2)
    together = Collective(size, Group(64, 8), twice=True).seconds(H100, link=1.0, network=1.0)  # eight cards
    assert together == pytest.approx(2 * size * 63 / 64 / 400e9, rel=2e-2)


def test_a_small_collective_takes_its_steps():
    fastest = min(p.base + 287 * p.network for p in PROTOCOLS)
    assert Collective(8.0, Group(288, 288)).seconds(H100, link=1.0, network=1.0) == pytest.approx(fastest, rel=1e-3)
    assert Collective(8.0, Group(1, 1)).seconds(H100, link=1.0, network=1.0) == 0.0


def test_what_is_computed_hides_what_travels():
    """Three units that compute 2 s each."""
    assert overlapped([UnitPass(2.0, gather=1.0)] * 3) == 1 + 6  # only the first gather is waited for
    assert overlapped([UnitPass(2.0, gather=3.0)] * 3) == 3 * 3 + 2  # the network is busy all the time
    assert overlapped([UnitPass(2.0, reduce=1.0)] * 3) == 6 + 1  # only the last reduction
    assert overlapped([UnitPass(2.0, reduce=5.0)] * 3) == 2 + 3 * 5
    # gather 2, compute 2 beside the second gather, 2 beside the first reduction, and the second reduction
    assert overlapped([UnitPass(2.0, gather=2.0, reduce=2.0)] * 2) == 2 + 2 + 2 + 2


def test_traffic_of_a_step_is_that_of_docs_layouts():
    job = job_of(compose_run([*NEMOTRON]), 768)
    tp, gathered, reduced = flows(job, units_of(job), 8)
    p = 1_954_295_808
    # 2 L layers x 2 passes x 2 (t - 1)/t x 2 B T D, embedding and final norm once each way
    layers = 64 * 2 * 2 * 7 / 8 * 2 * 4 * 4096 * 6144
    assert tp.link == pytest.approx(layers, rel=0.03)
    assert gathered.network == pytest.approx(2 * p * 95 / 96, rel=1e-6)
    assert reduced.network == pytest.approx(4 * p * 95 / 96, rel=1e-6)
    assert tp.network == gathered.link == reduced.link == 0


def test_shard_modes_gather_as_documented():
    words = [
        "model=nemotron4_tiny",
        "precision=bf16",
        "data.seq_len=64",
        "train.max_steps=1",
        "train.micro_batch_size=1",
    ]
    base = job_of(compose_run([*words, "train.global_batch_size=24"]), 8)  # three micro-batches
    units = units_of(base)
    layers = sum(unit.gathered for unit in units[1:-1]) * 7 / 8
    ends = (units[0].gathered + units[-1].gathered) * 7 / 8
    numbers = sum(unit.numbers for unit in units)
    for mode, gathered in (("none", 0), ("optimizer", layers + ends), ("full", 6 * layers + 3 * ends)):
        job = replace(base, engine=replace(base.engine, shard=mode))
        rows = {flow.what: flow.link for flow in flows(job, units, 8)}
        assert rows.pop("weights gathered", 0) == pytest.approx(gathered)
        (reduced,) = rows.values()
        assert reduced == pytest.approx((8 if mode == "none" else 4) * numbers * 7 / 8)


def test_mfu_column_of_nemotron_4():
    """Its iteration times, through the count that plan and metrics share."""
    for row, seconds, mfu in zip(PUBLISHED, (0.57, 0.58, 0.64), (34.3, 33.3, 30.5)):
        assert 100 * Clock(H100).mfu(row.job(), seconds) == pytest.approx(mfu, abs=0.5)


def test_one_constant_is_fitted_on_one_row_and_predicts_the_others():
    first, *others = PUBLISHED[:3]
    assert fitted(first) == pytest.approx(DEFAULT.matmul, abs=0.002)
    for row in others:
        assert predicted(row) == pytest.approx(row.speed, rel=0.10)


TINY = ["model=nemotron4_tiny", "precision=bf16", "data.seq_len=64", "data.reset_attention=false", "train.max_steps=1"]
TINY += ["train.micro_batch_size=1", "train.global_batch_size=8"]


def test_a_teacher_runs_forward():
    """A third of its training FLOPs, as training's MFU counts it, before every micro-batch; what it gathers travels too."""
    run = compose_run([*TINY, "objective=distillation", "objective.teacher=given"])
    job = job_of(run, 2, teacher=replace(run.model, num_layers=run.model.num_layers + 2))
    alone, clock = replace(job, teacher=None), Clock(H100)
    there, before = (clock.step(one, units_of(one)) for one in (job, alone))
    assert there.parts["forward of the teacher"] > 0
    assert there.seconds > before.seconds + there.parts["forward of the teacher"]  # the loss multiplies with its head
    theirs = clock.flops_per_token(replace(alone, model=job.teacher.model))
    assert clock.flops_per_token(job) == pytest.approx(clock.flops_per_token(alone) + theirs / 3)
    units = units_of(job)
    rows = {flow.what: flow.link for flow in flows(job, units, 8)}
    gathered = sum(unit.gathered for unit in units if unit.frozen) / 2
    assert rows["weights of the teacher gathered"] == pytest.approx(4 * gathered)  # four micro-batches


@pytest.mark.parametrize("words", [["engine.shard=full"], ["engine=deepspeed"]])
def test_offloading_takes_time(words):
    job = job_of(compose_run([*TINY, *words]), 2)
    key = "offload_optimizer" if job.engine.name == "deepspeed" else "cpu_offload"
    offloaded = replace(job, engine=replace(job.engine, **{key: True}))
    there, on_cpu = (Clock(H100).step(one, units_of(one)) for one in (job, offloaded))
    numbers = sum(unit.numbers for unit in units_of(job)) / 2
    assert on_cpu.parts["update"] >= 0.999 * 40 * numbers / DEFAULT.host_memory
    assert on_cpu.seconds - there.seconds > on_cpu.parts["update"] - there.parts["update"] - 1e-9


@pytest.mark.slow
def test_published_trainings_are_predicted_as_documented():
    """22 % is more than the largest error, and less than what separates the layouts that one would choose between."""
    speeds = predictions()
    errors = [abs(error(row, speeds[row.name])) for row in PUBLISHED[1:]]
    assert statistics.median(errors) < 8
    assert max(errors) < 22
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    assert [line for line in lines(speeds) if line not in page] == []
