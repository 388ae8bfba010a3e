"""Learning rates against the formulas as the papers print them, batch sizes against a step-by-step count."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.optim.schedule import BatchSize, LearningRate, RampStage, ScheduleConfig


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


@given(first=st.integers(1, 9), ramp=ramps, steps=st.integers(0, 60), samples=st.integers(0, 400))
def test_ramp_counts_like_a_loop(first, ramp, steps, samples):
    stages, start = [], 0
    for gap, size in ramp:
        start += gap
        stages.append(RampStage(start, size))
    batch = BatchSize(first, stages)
    consumed = 0
    for _ in range(steps):
        consumed += batch.at(consumed)
    assert batch.samples(steps) == consumed
    consumed, count = 0, 0
    while consumed < samples:
        consumed, count = consumed + batch.at(consumed), count + 1
    assert batch.steps(samples) == count


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
