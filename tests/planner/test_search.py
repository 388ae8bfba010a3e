"""The best layouts on so many GPUs: each composes, fits and is the fastest that does; each other one says why it loses."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import pytest

from megatron_lite.hardware import gpu_named
from megatron_lite.models.flops import parameter_count
from megatron_lite.planner.memory import OUTSIDE, Traced, memory, memory_at_least
from megatron_lite.planner.plan import overrides_of, plan
from megatron_lite.planner.search import NOT_SEARCHED, layouts, search, variants
from megatron_lite.training.config import compose_run, validate
from megatron_lite.training.planning import check_layout, job_of

WORDS = ["model=nemotron4_tiny", "precision=bf16", "data.seq_len=64", "data.reset_attention=false", "train.max_steps=1"]
WORDS += ["train.global_batch_size=16"]
# so little memory beside what is outside of the allocator that layouts of a tiny model do not all fit
SMALL = replace(gpu_named("h100"), name="small", memory=OUTSIDE + 90e6, node=4)


@pytest.fixture(scope="module")
def found():
    run = compose_run(WORDS)
    return search(job_of(run, 4), SMALL, check=partial(check_layout, run), show=24)


@pytest.mark.slow
def test_every_listed_layout_composes(found):
    listed = found.best if len(found.best) <= 20 else random.Random(0).sample(found.best, 20)
    assert len(listed) == 20
    for one in listed:
        run = compose_run([*WORDS, *overrides_of(one.job).split()])
        validate(run, world_size=4)
        assert job_of(run, 4) == replace(one.job, parallel=replace(one.job.parallel, dp_shard=None))


@pytest.mark.slow
def test_every_other_layout_says_why_it_loses(found):
    assert found.best[0].loses == ""
    seconds = [one.step.seconds for one in found.best]
    assert seconds == sorted(seconds)
    assert all(one.loses for one in (*found.best[1:], *found.others))
    reasons = " ".join(one.loses for one in found.others)
    for reason in ("does not fit", "slower", "does not divide by parallel.tp=4"):
        assert reason in reasons
    assert all(one.memory + OUTSIDE > 0 and one.memory <= SMALL.memory for one in found.best)


@pytest.mark.slow
def test_the_first_one_is_the_fastest_that_fits(found):
    """Against planning every layout by itself."""
    run = compose_run(WORDS)
    job = job_of(run, 4)
    seconds = []
    for cut in layouts(job, SMALL.node):
        if cut.parallel.cp > 1 or cut.parallel.tp > 1:
            continue
        for layout in variants(cut, SMALL.node):
            if memory(layout).total + OUTSIDE <= SMALL.memory:
                seconds.append(plan(layout, SMALL).step.seconds)
    assert found.best[0].step.seconds <= min(seconds) * (1 + 1e-9)


def test_nothing_fits():
    run = compose_run([*WORDS, "train.global_batch_size=1"])
    tiny = replace(SMALL, memory=OUTSIDE)
    with pytest.raises(ValueError, match=r"no layout fits gpus=1 gpu=small.*parallel\.tp=.*more gpus"):
        search(job_of(run, 1), tiny, check=partial(check_layout, run))


def test_a_batch_that_no_layout_divides():
    run = compose_run([*WORDS, "train.global_batch_size=1"])
    with pytest.raises(ValueError, match=r"gpus=3 .*global batch of 1 .*3 would do"):
        search(job_of(run, 3), SMALL, check=partial(check_layout, run))


def test_a_model_that_no_layout_holds_is_refused_at_once(monkeypatch):
    """No pass is run, for weights and inputs of layers alone are too large."""
    run = compose_run(["experiment=nemotron4_15b", "train.batch_ramp=[]"])
    monkeypatch.setattr(Traced, "of", lambda *_: pytest.fail("passes were run"))
    with pytest.raises(ValueError, match=r"no layout fits gpus=8 gpu=l4: the nearest, .* at least \d+\.\d of 24 GB"):
        search(job_of(run, 8), gpu_named("l4"), check=partial(check_layout, run))


def test_the_least_that_is_held_is_a_part_of_what_is_held():
    for words, gpus in ((["model=nemotron4_tiny"], 1), (["model=nano2_tiny", "parallel.tp=2"], 4)):
        job = job_of(compose_run([*WORDS, *words, "parallel.recompute=full", "engine.shard=full"]), gpus)
        least = memory_at_least(job, parameter_count(job.model))
        assert 0.2 * memory(job).total < least <= memory(job).total


def test_a_larger_micro_batch_may_hold_less():
    """One that is the whole share keeps no gradients from one micro-batch to the next."""
    run = compose_run([*WORDS, "train.global_batch_size=2"])
    halves, whole = (replace(job_of(run, 1), micro_batch=size) for size in (1, 2))
    held = [memory(job).total + OUTSIDE for job in (halves, whole)]
    assert held[1] < held[0]
    found = search(halves, replace(SMALL, memory=sum(held) / 2), check=partial(check_layout, run))
    assert {one.job.micro_batch for one in found.best} == {2}


def test_a_search_ends_when_its_time_is_over():
    """After the first cut that fits, and it says what was not looked at."""
    run = compose_run([*WORDS, "train.global_batch_size=2"])
    job = job_of(run, 2)
    found = search(job, gpu_named("h100"), check=partial(check_layout, run), show=1, patience=0.0)
    left = [one.job for one in found.others if one.loses == NOT_SEARCHED]
    cuts = list(layouts(job, gpu_named("h100").node))
    assert found.best
    assert left == cuts[1:]
    assert {(one.job.parallel.tp, one.job.parallel.cp) for one in found.best} == {(1, 1)}
