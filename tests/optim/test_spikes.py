"""The verdict of the spike detector against the same formula in NumPy, written as a loop."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from megatron_lite.optim.schedule import Progress
from megatron_lite.optim.spikes import SpikeConfig, SpikeDetector, Spikes, not_finite

CPU = torch.device("cpu")
CONFIG = SpikeConfig(window=9, threshold=5.0)


def curves(steps: int, bad: dict[int, tuple[float, float]]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step: falling and noisy, and `bad` where it says so."""
    draw = np.random.default_rng(0)
    rows = [(5 - 0.01 * s + 0.02 * draw.normal(), 1 + 0.05 * draw.normal()) for s in range(1, steps + 1)]
    return [bad.get(step, row) for step, row in enumerate(rows, start=1)]


def verdicts(detector: SpikeDetector, rows: list[tuple[float, float]], *, first: int = 1) -> list[bool]:
    return [
        bool(detector.judge(Progress(step, 8 * step))(torch.tensor(loss), torch.tensor(norm)))
        for step, (loss, norm) in enumerate(rows, start=first)
    ]


def expected(rows: list[tuple[float, float]]) -> list[bool]:
    recent: list[np.ndarray] = []
    found = []
    for row in rows:
        values = np.array(row, dtype=np.float32)
        spike = not np.isfinite(values).all()
        if len(recent) == CONFIG.window:
            median = np.median(recent, axis=0)  # the window is odd, so it is one of the values
            spread = 1.4826 * np.median(np.abs(recent - median), axis=0)
            spike |= bool((values > median + CONFIG.threshold * np.maximum(spread, 0.01 * median)).any())
        if not spike:
            recent = [*recent, values][-CONFIG.window :]
        found.append(spike)
    return found


BAD = {3: (50.0, 1.0), 25: (9.0, 1.0), 26: (5.0, 9.0), 30: (math.nan, 1.0), 31: (0.1, 0.1), 40: (5.0, math.inf)}


def test_spikes_in_loss_and_gradient_are_found_and_nothing_else():
    rows = curves(60, BAD)
    detector = SpikeDetector(CONFIG, device=CPU)
    assert verdicts(detector, rows) == expected(rows)
    # the third is before the window is full, the 31st lies below
    assert expected(rows) == [step in (25, 26, 30, 40) for step in range(1, 61)]
    assert detector.read() == Spikes(count=4, first_step=25, end_sample=320)
    assert detector.read() is None


def test_its_state_goes_through_json_to_the_same_verdicts():
    rows = curves(60, BAD)
    for stop in (0, 4, 26, 45):
        first = SpikeDetector(CONFIG, device=CPU)
        before = verdicts(first, rows[:stop])
        second = SpikeDetector(CONFIG, device=CPU)
        second.load_state(json.loads(json.dumps(first.state())))
        assert before + verdicts(second, rows[stop:], first=stop + 1) == expected(rows)
        assert second.read() == Spikes(count=4, first_step=25, end_sample=320)


def test_a_burst_longer_than_the_window_stays_one():
    """Spikes that entered the window would become what the next ones are measured against."""
    rows = curves(40, dict.fromkeys(range(15, 30), (9.0, 5.0)))
    assert verdicts(SpikeDetector(CONFIG, device=CPU), rows) == [15 <= step < 30 for step in range(1, 41)]


def test_a_state_replaces_what_was_there_by_its_newest_rows():
    high, rows = [(50.0, 50.0)] * 12, curves(30, {})
    saved = SpikeDetector(CONFIG, device=CPU)
    verdicts(saved, high[:3] + rows)
    smaller = SpikeDetector(SpikeConfig(window=5, threshold=5.0), device=CPU)
    smaller.load_state(saved.state())
    assert smaller.state()["recent"] == saved.state()["recent"][-5:]
    part = SpikeDetector(CONFIG, device=CPU)
    verdicts(part, rows[:4])
    going_back = SpikeDetector(CONFIG, device=CPU)
    verdicts(going_back, high)
    going_back.load_state(part.state())
    assert going_back.state() == part.state()


@pytest.mark.parametrize("state", [{}, {"recent": [[1.0]], "unread": [0, 0, 0]}, {"recent": [], "unread": ["x"]}])
def test_another_state_is_refused(state):
    with pytest.raises(ValueError, match="spike detector"):
        SpikeDetector(CONFIG, device=CPU).load_state(state)


def test_without_a_detector_only_what_is_not_finite_is_left_out():
    assert [not_finite(torch.tensor(loss), torch.tensor(1.0)).item() for loss in (9e9, math.inf, math.nan)] == [0, 1, 1]
