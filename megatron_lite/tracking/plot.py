"""loss.png: training and validation loss at a glance, with learning rate and gradient norm below.

Drawn from metrics.jsonl with matplotlib's Agg canvas (no display, no global state).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lite.tracking.base import Row
from megatron_lite.tracking.jsonl import METRICS_FILE, read_rows

# Eight hues that stay apart for color-blind eyes on white (adjacent ones most); then the same dashed.
COLORS = ("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#e87ba4", "#008300", "#4a3aa7", "#e34948")
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_INK, _FAINT, _GRID = "#333330", "#8a8a84", "#e6e6e1"


@dataclass
class Curves:
    """The columns of a run's rows: lists of the same length, None where a row had no such value."""

    training: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of a training column."""
        pairs = [(row["step"], row[key]) for row in self.training if _finite(row.get(key))]
        return [p[0] for p in pairs], [p[1] for p in pairs]

    def sources(self) -> list[str]:
        """Validation sources in the order of their first appearance."""
        return list(dict.fromkeys(source for row in self.validation for source in row["val_loss"]))

    def source(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and finite validation losses of a source."""
        pairs = [(r["step"], r["val_loss"][name]) for r in self.validation if _finite(r["val_loss"].get(name))]
        return [p[0] for p in pairs], [p[1] for p in pairs]


def read_curves(rows: Iterable[Row]) -> Curves:
    """Part rows into training and validation; rows of neither kind are passed over."""
    curves = Curves()
    for row in rows:
        if not isinstance(row.get("step"), int):
            continue
        if "loss" in row:
            curves.training.append(row)
        elif isinstance(row.get("val_loss"), dict):
            curves.validation.append(row)
    return curves


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean of the `width` values around each one; at the end, of those there are.

    A centered window leaves a straight line where it is, where one that trails lags behind a falling loss. At the
    start, where losses fall fast, the window is cut evenly on both sides to stay centered.
    """
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        reach = min(width // 2, i)
        end = min(len(values), i + reach + 1)
        means.append((sums[end] - sums[i - reach]) / (end - i + reach))
    return means


def smoothing_width(count: int) -> int:
    """A fortieth of the curve, at least 1: smooth to the eye, and short runs stay as they are."""
    return max(1, count // 40)


def write_loss_plot(run_dir: str | Path) -> Path | None:
    """Write `run_dir/loss.png`, atomically, from `run_dir/metrics.jsonl`; None when there is no row to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second of import, not needed to train
    from matplotlib.figure import Figure

    run_dir = Path(run_dir)
    curves = read_curves(read_rows(run_dir / METRICS_FILE))
    if not curves.training and not curves.validation:
        return None
    sources = curves.sources()
    outside = len(sources) > 6
    figure = Figure(figsize=(10 if outside else 8.4, 6.4), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_losses(top, curves, run_dir.resolve().name)
    _legend(top, outside)
    _draw_schedule(bottom, curves)
    path = run_dir / "loss.png"
    temporary = run_dir / ".loss.png.tmp"
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
    return path


def _draw_losses(axes: Any, curves: Curves, title: str) -> None:
    steps, losses = curves.column("loss")
    width = smoothing_width(len(losses))
    if width > 1:
        axes.plot(steps, losses, color=_INK, alpha=0.22, linewidth=0.8)
    axes.plot(steps, smooth(losses, width), color=_INK, linewidth=1.6, label="training", zorder=5)
    for i, source in enumerate(curves.sources()):
        style = {"color": COLORS[i % 8], "linestyle": DASHES[i // 8 % 4], "linewidth": 1.6}
        points = curves.source(source)
        marker = "o" if len(points[0]) <= 20 else ""
        axes.plot(*points, label=_label(source), marker=marker, markersize=3.5, **style)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK)
    axes.set_ylabel("loss (nats a token)")
    _dress(axes)


def _draw_schedule(axes: Any, curves: Curves) -> None:
    axes.plot(*curves.column("lr"), color=COLORS[0], linewidth=1.6)
    axes.set_ylabel("learning rate", color=COLORS[0])
    axes.set_xlabel("step")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    _dress(axes)
    axes.set_ylim(bottom=0)
    twin = axes.twinx()
    steps, norms = curves.column("grad_norm")
    twin.plot(steps, norms, color=COLORS[1], linewidth=0.9, alpha=0.85)
    if norms and min(norms) > 0 and max(norms) > 30 * min(norms):
        twin.set_yscale("log")
    twin.set_ylabel("gradient norm", color=COLORS[1])
    for side in ("top", "left", "bottom", "right"):
        twin.spines[side].set_visible(False)
    twin.tick_params(colors=_FAINT, labelsize=8, length=0)


def _legend(axes: Any, outside: bool) -> None:
    style = {"frameon": False, "labelcolor": _INK}
    if not outside:
        axes.legend(loc="upper right", fontsize=8.5, **style)
        return
    handles, labels = (
        axes.get_legend_handles_labels()
    )  # the figure's own legend: beside both panels, stretching neither
    axes.figure.legend(handles, labels, loc="outside right upper", fontsize=8.5 if len(labels) < 24 else 7.5, **style)


def _dress(axes: Any) -> None:
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.tick_params(colors=_FAINT, labelcolor=_INK, labelsize=9, length=0)
    axes.margins(x=0.01)


def _label(source: str) -> str:
    """matplotlib leaves out labels that start with an underscore and reads $ as mathematics."""
    return source.replace("$", r"\$").removeprefix("_")


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
