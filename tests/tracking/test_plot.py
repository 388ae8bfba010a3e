from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.tracking import write_loss_plot
from megatron_lite.tracking.curves import read_curves, smooth
from megatron_lite.tracking.jsonl import METRICS_FILE, encode_row
from megatron_lite.tracking.plot import column_svg, loss_svg


def write(run_dir: Path, rows: list[dict]) -> None:
    (run_dir / METRICS_FILE).write_bytes(b"".join(encode_row(row) for row in rows))


def rows(sources: int, steps: int = 100) -> list[dict]:
    training = [{"step": i, "loss": 9 - i / 20, "lr": 1e-3, "grad_norm": 1.0} for i in range(1, steps + 1)]
    names = [f"source {i}" for i in range(sources)]
    return [
        *training,
        *({"step": i, "val_loss": {name: 5 + n / 4 - i / 50 for n, name in enumerate(names)}} for i in (0, 50, 100)),
    ]


@pytest.mark.parametrize("sources", [0, 3, 12])
def test_the_picture_has_ink_and_room_for_its_legend(tmp_path: Path, sources: int) -> None:
    from matplotlib.image import imread

    write(tmp_path, rows(sources))
    path = write_loss_plot(tmp_path)
    assert path == tmp_path / "loss.png"
    pixels = imread(path)[..., :3]
    height, width, _ = pixels.shape
    assert min(height, width) >= 800
    assert width / height > (1.5 if sources > 6 else 1.2)
    blue = np.abs(pixels - np.array([0x2A, 0x78, 0xD6]) / 255).max(-1) < 0.02
    assert blue[height * 3 // 4 :].sum() > 100  # the learning rate in the lower panel
    assert (blue[: height * 2 // 3].sum() > 100) == (sources > 0)  # the first source in the upper one
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_odd_rows_are_drawn_or_passed_over(tmp_path: Path) -> None:
    nan = float("nan")
    odd = [
        {"step": 1, "loss": nan, "lr": None, "grad_norm": float("inf")},
        {"step": 2, "loss": 3.0},
        {"step": 2, "val_loss": {"_hidden $x$": 1.0, "b": nan}},
        {"note": "no step"},
    ]
    write(tmp_path, odd)
    assert write_loss_plot(tmp_path) is not None
    curves = read_curves(odd)
    assert curves.column("loss") == ([2], [3.0])
    assert curves.source("b") == ([], [])
    assert curves.source("_hidden $x$") == ([2], [1.0])


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert write_loss_plot(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [0, 1, 79, 80, 200])
def test_smoothing_against_a_plain_mean(count: int) -> None:
    values = list(np.random.default_rng(0).normal(size=count))
    means = smooth(values)
    assert len(means) == count
    for i, mean in enumerate(means):
        reach = min(count // 80, i)
        # Differences of running sums: 200 roundings of 1e-15.
        assert mean == pytest.approx(np.mean(values[i - reach : i + reach + 1]), abs=1e-12)


def test_the_same_rows_give_the_same_bytes() -> None:
    first, second = (
        loss_svg(curves) + column_svg(curves, "lr", title="rate", color="#2a78d6", zero=True)
        for curves in (read_curves(rows(3)), read_curves(rows(3)))
    )
    assert "url(#" in first  # ids, which matplotlib draws at random by default
    assert first == second


def test_a_long_curve_is_small_and_keeps_its_spikes() -> None:
    noise = np.random.default_rng(0).uniform(1, 2, size=50_000)
    noise[31_234] = 40.0
    curves = read_curves({"step": i, "loss": 1.0, "grad_norm": float(value)} for i, value in enumerate(noise))
    svg = column_svg(curves, "grad_norm", title="norm", color="#123456", zero=False)
    assert len(svg) < 200_000
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: #123456', svg)
    heights = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)]
    middle = np.median(heights)  # of a curve between 1 and 2, with a spike to 40: 38.5 up against 0.5 down
    assert (middle - min(heights)) / (max(heights) - middle) == pytest.approx(77, rel=0.1)


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-3.0, -3.0], [1e-30, 1e30]])
def test_odd_curves_can_be_drawn(values: list[float]) -> None:
    curves = read_curves({"step": i, "loss": 1.0, "lr": value} for i, value in enumerate(values))
    for zero in (True, False):
        svg = column_svg(curves, "lr", title="rate", color="#123456", zero=zero)
        assert "#123456" in svg
        assert "nan" not in svg
