"""The recipe of Hymba 1.5B: two runs with one learning-rate schedule."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.models.rope import Rotary
from megatron_lite.optim.schedule import DECAY_SHAPES, LearningRate, ScheduleConfig
from megatron_lite.training.config import compose_run, validate


def test_two_runs_are_one_schedule():
    first, second = (compose_run([f"experiment=hymba_1p5b{end}"]) for end in ("", "_8k"))
    second.init_from.path = "runs/hymba_1p5b"
    rates = []
    for run in (first, second):
        validate(run, world_size=128)
        tokens = run.train.global_batch_size * run.data.seq_len
        assert tokens == 2 * 2**20
        steps = run.train.max_steps
        rates.append(LearningRate(run.schedule, peak=run.optim.lr, total_steps=steps, total_tokens=steps * tokens))
    total, end = 572_205 + 47_684, 572_205
    warmup, decay = round(0.01 * total), round(0.2 * total)
    whole = ScheduleConfig(name="wsd", warmup_steps=warmup, decay=decay, min_lr=1e-5)
    expected = LearningRate(whole, peak=3e-3, total_steps=total, total_tokens=0)
    assert DECAY_SHAPES[whole.decay_shape](0.5) == 0.5
    for step in (1, warmup, 400_000, total - decay + 1, end - 1, end, end + 1, total - 1000, total):
        rate = rates[0](step, 0) if step <= end else rates[1](step - end, 0)
        assert rate == pytest.approx(expected(step, 0), rel=1e-4)  # 1.16e-3 has three digits
    assert [run.model.max_seq_len for run in (first, second)] == [2048, 8192]
    periods = [1 / Rotary(run.model).tables(torch.tensor([[1]]))[1].asin().flatten()[-1] for run in (first, second)]
    assert periods[1] / periods[0] == pytest.approx(7, rel=1e-3)  # the slowest pair is stretched by 2 x 4 - 1


def test_a_start_in_the_middle_of_a_decay():
    config = ScheduleConfig(name="wsd", decay_fraction=1.0, start_lr=0.5, min_lr=0.1)
    rate = LearningRate(config, peak=1.0, total_steps=4, total_tokens=0)
    assert [rate(step, 0) for step in (1, 2, 4)] == pytest.approx([0.4, 0.3, 0.1])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"start_lr": 2.0}, r"schedule\.start_lr=2\.0 .*optim\.lr=1\.0"),
        ({"start_lr": 0.05}, r"schedule\.min_lr=0\.1 is above schedule\.start_lr=0\.05"),
        ({"start_lr": 0.5, "warmup_steps": 3}, r"schedule\.start_lr=0\.5 and schedule\.warmup_steps=3"),
    ],
)
def test_impossible_starts_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        LearningRate(ScheduleConfig(min_lr=0.1, **keys), peak=1.0, total_steps=10, total_tokens=0)
