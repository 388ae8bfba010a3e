"""Learning rates against the formulas as the papers print them, batch sizes against a step-by-step count."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.optim.schedule import (
    BatchSize,
    LearningRate,
    Progress,
    Projection,
    RampStage,
    Schedule,
    ScheduleConfig,
)


def rates(peak=1.0, horizon=100, **keys):
    schedule = LearningRate(ScheduleConfig(**keys), peak=peak, total_steps=horizon, total_tokens=horizon * 10)
    return [schedule(step, step * 10) for step in range(1, horizon + 1)]


def test_warmup_is_linear_and_ends_at_the_peak():
    lr = rates(name="constant", warmup_steps=10)
    assert lr[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert set(lr[10:]) == {1.0}


def test_cosine_is_half_a_wave_from_warmup_to_horizon():
    lr = rates(name="cosine", warmup_steps=20, min_lr=0.1)
    for step in (20, 35, 60, 99, 100):
        r = (step - 20) / 80
        assert lr[step - 1] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * r)) / 2)
    assert lr[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("shape", "formula"),
    [
        ("linear", lambda r: 0.1 + 0.9 * (1 - r)),
        ("cosine", lambda r: 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * r))),
        ("exponential", lambda r: 0.1 + 0.9 * (2 * 0.5**r - 1)),
        ("one_minus_sqrt", lambda r: 0.1 + 0.9 * (1 - r**0.5)),
        ("quarter_cosine", lambda r: max(0.1, math.cos(math.pi * r / 2))),
    ],
)
def test_wsd_decays_by_its_shape_over_the_last_part(shape, formula):
    lr = rates(name="wsd", warmup_steps=5, min_lr=0.1, decay=40, decay_shape=shape)
    assert set(lr[4:60]) == {1.0}
    assert lr[60:] == pytest.approx([formula(k / 40) for k in range(1, 41)])
    assert lr[-1] == pytest.approx(0.1)


def test_tokens_as_the_unit():
    lr = rates(name="wsd", unit="tokens", warmup_tokens=100, decay_fraction=0.5)
    assert lr[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert lr[49] == 1.0
    assert lr[74] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "cos"}, r"schedule\.name=cos"),
        ({"name": "wsd"}, r"schedule\.decay_fraction"),
        ({"name": "wsd", "decay": 10, "decay_fraction": 0.1}, "exclude each other"),
        ({"name": "wsd", "decay": 95, "warmup_steps": 10}, "do not fit"),
        ({"name": "cosine", "warmup_steps": 101}, "do not fit"),
        ({"name": "cosine", "min_lr": 2.0}, r"min_lr=2\.0"),
        ({"name": "cosine", "warmup_tokens": 5}, r"schedule\.warmup_tokens"),
        ({"name": "wsd", "decay": 10, "decay_shape": "cubic"}, "cubic"),
    ],
)
def test_impossible_schedules_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        rates(**keys)


ramps = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), max_size=4)


def batch_of(first, ramp):
    stages, start = [], 0
    for gap, size in ramp:
        start += gap
        stages.append(RampStage(start, size))
    return BatchSize(first, stages)


numbers = st.integers(0, 400)


@given(first=st.integers(1, 9), ramp=ramps, steps=st.integers(0, 60), samples=numbers, start=numbers)
def test_ramp_counts_like_a_loop(first, ramp, steps, samples, start):
    batch = batch_of(first, ramp)
    consumed = start
    for _ in range(steps):
        consumed += batch.at(consumed)
    assert batch.samples(steps, start=start) == consumed
    consumed, count = start, 0
    while consumed < samples:
        consumed, count = consumed + batch.at(consumed), count + 1
    assert batch.steps(samples, start=start) == count


@given(
    first=st.integers(1, 9),
    ramp=ramps,
    start=st.builds(Progress, st.integers(0, 30), st.integers(0, 200), st.integers(0, 2000)),
    in_tokens=st.booleans(),
    length=st.integers(1, 60),
    unit=st.sampled_from(["steps", "tokens"]),
)
def test_a_run_ends_where_it_was_asked_to_and_only_there_with_the_last_rate(
    first, ramp, start, in_tokens, length, unit
):
    """Whatever the batch sizes and the sequence length were before `start`; against a walk step by step."""
    seq_len = 10
    projection = Projection(start, batch_of(first, ramp), seq_len)
    end = projection.at_tokens(length * 50) if in_tokens else projection.at_step(length)
    lr = LearningRate(
        ScheduleConfig(name="cosine", unit=unit), peak=1.0, total_steps=end.step, total_tokens=end.consumed_tokens
    )
    schedule = Schedule(projection, lr, end)
    step, samples, tokens = start.step, start.consumed_samples, start.consumed_tokens
    rates = []
    while tokens < length * 50 if in_tokens else step < length:
        size = projection.batch.at(samples)
        step, samples, tokens = step + 1, samples + size, tokens + size * seq_len
        rates.append(schedule.rate(Progress(step, samples, tokens)))
        assert projection.at_step(step) == Progress(step, samples, tokens)
    assert end == Progress(step, samples, tokens)
    assert [rate == 0.0 for rate in rates] == [False] * (len(rates) - 1) + [True] * bool(rates)
    assert schedule.end_of_job(start.step + 2).step == min(start.step + 2, end.step)


def test_nemotron4_ramp_takes_the_published_number_of_steps():
    # 2402.16819 Table 2: 200B tokens at 384, 200B at 768, 7,600B at 1152 sequences of 4096.
    def sequences(tokens):
        return tokens // 4096

    batch = BatchSize(384, [RampStage(sequences(200 * 10**9), 768), RampStage(sequences(400 * 10**9), 1152)])
    assert batch.steps(sequences(200 * 10**9)) == pytest.approx(127_157, abs=1)  # the table's division, rounded up
    assert batch.steps(sequences(8000 * 10**9)) == pytest.approx(127_157 + 63_578 + 1_610_650, abs=3)


def test_a_ramp_that_does_not_grow_is_refused():
    with pytest.raises(ValueError, match=r"train\.batch_ramp"):
        BatchSize(4, [RampStage(10, 8), RampStage(10, 16)])
    with pytest.raises(ValueError, match="global_batch_size=0"):
        BatchSize(0)
