"""Drawings of a run with matplotlib: loss.png, and the charts of report.html as inline SVG.

Notable:
  - no pyplot, so no display and no window; matplotlib takes a second to import, so only what draws imports it;
  - the same rows give the same bytes: no date, and ids from a fixed salt;
  - long curves stay small in SVG: matplotlib joins the points that lie within a pixel, spikes stay visible.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from megatron_lite.atomic import whole_file
from megatron_lite.tracking.curves import Curves, read_curves, smooth
from megatron_lite.tracking.jsonl import METRICS_FILE, read_rows

# Eight hues that color-blind readers can tell apart (adjacent ones best); the next eight are the same, dashed.
COLORS = ("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#e87ba4", "#008300", "#4a3aa7", "#e34948")
DASHES = ("-", "--", ":", "-.")
INK, FAINT, GRID = "#333330", "#66665f", "#e6e6e1"

SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": "megatron_lite", "path.simplify_threshold": 1.0}


def write_loss_plot(run_dir: str | Path) -> Path | None:
    """Write `run_dir/loss.png`, atomically, from `run_dir/metrics.jsonl`; None when there is no row to draw."""
    run_dir = Path(run_dir)
    curves = read_curves(read_rows(run_dir / METRICS_FILE))
    if not curves.training and not curves.validation:
        return None
    beside = len(curves.sources()) > 6  # where the legend goes
    path = run_dir / "loss.png"
    with whole_file(path) as temporary, figure_of(10 if beside else 8.4, 6.4) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        _draw_losses(top, curves)
        top.set_title(_label(run_dir.resolve().name), loc="left", fontsize=12, fontweight="bold", color=INK)
        top.set_ylabel("loss (nats per token)")
        _legend(top, beside=beside)
        _draw_schedule(bottom, curves)
        figure.savefig(temporary, format="png", dpi=130, facecolor="white")
    return path


def loss_svg(curves: Curves) -> str:
    """An <svg> of training and validation losses. The names of the sources appear on hover only."""
    with figure_of(8.8, 4.2, SVG) as figure:
        _draw_losses(figure.subplots(), curves)
        svg = draw_svg(figure, "Training and validation loss by step")
    for i, source in enumerate(curves.sources()):
        svg = svg.replace(f'<g id="source_{i}">', f"<g><title>{escape(source)}</title>")
    return svg


def column_svg(curves: Curves, key: str, *, title: str, color: str, zero: bool) -> str:
    """An <svg> of the training column `key`. zero: the y axis starts at 0."""
    with figure_of(4.6, 2.2, SVG) as figure:
        _draw_column(figure.subplots(), curves, key, color=color, zero=zero)
        return draw_svg(figure, f"{title} by step")


@contextmanager
def figure_of(width: float, height: float, settings: Any = None) -> Iterator[Any]:
    """A figure of this size in inches, with matplotlib's `settings` in force until it is saved."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a source may be named in any script
        yield Figure(figsize=(width, height), layout="constrained")


def draw_svg(figure: Any, label: str) -> str:
    """The figure as an <svg> for an HTML page, without the header, links and date of an SVG file."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    body = text.getvalue().partition("<svg")[2].partition(">")[2]
    width, height = 72 * figure.get_size_inches()
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{body}'


def _draw_losses(axes: Any, curves: Curves) -> None:
    steps, losses = curves.column("loss")
    smoothed = smooth(losses)
    if smoothed != losses:
        axes.plot(steps, losses, color=INK, alpha=0.22, linewidth=0.8)
    axes.plot(steps, smoothed, color=INK, linewidth=1.6, label="training", zorder=5, marker=_marker(losses, 1))
    for i, source in enumerate(curves.sources()):
        style = {"color": COLORS[i % 8], "linestyle": DASHES[i // 8 % 4], "linewidth": 1.6, "markersize": 3.5}
        points = curves.source(source)
        axes.plot(*points, label=_label(source), marker=_marker(points[0], 20), gid=f"source_{i}", **style)
    dress(axes)


def _draw_schedule(axes: Any, curves: Curves) -> None:
    _draw_column(axes, curves, "lr", color=COLORS[0], zero=True)
    axes.set_ylabel("learning rate", color=COLORS[0])
    axes.set_xlabel("step")
    norms = axes.twinx()
    _draw_column(norms, curves, "grad_norm", color=COLORS[1], zero=False)
    norms.set_ylabel("gradient norm", color=COLORS[1])
    norms.grid(False)


def _draw_column(axes: Any, curves: Curves, key: str, *, color: str, zero: bool) -> None:
    """A logarithmic axis where the values are positive and span more than a factor of 50 (gradient norms)."""
    steps, values = curves.column(key)
    axes.plot(steps, values, color=color, linewidth=1.2, marker=_marker(values, 1))
    axes.ticklabel_format(axis="y", scilimits=(-2, 5))
    dress(axes)
    if zero:
        axes.set_ylim(bottom=0)
    elif values and min(values) > 0 and max(values) > 50 * min(values):
        axes.set_yscale("log")


def _legend(axes: Any, *, beside: bool) -> None:
    style = {"frameon": False, "labelcolor": INK}
    if not beside:
        axes.legend(loc="upper right", fontsize=8.5, **style)
        return
    handles, labels = axes.get_legend_handles_labels()
    # The figure's own legend is beside both panels and stretches neither.
    axes.figure.legend(handles, labels, loc="outside right upper", fontsize=8.5 if len(labels) < 24 else 7.5, **style)


def dress(axes: Any) -> None:
    """Grid, spines and labels as all drawings here have them."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 12k
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(which="both", color=FAINT, labelcolor=INK, labelsize=9, length=0)
    axes.margins(x=0.01)


def _marker(values: list[Any], most: int) -> str:
    """A dot for each value of a short curve: a single value has no line."""
    return "o" if len(values) <= most else ""


def _label(name: str) -> str:
    """Long names cut; matplotlib leaves out labels that start with _ and reads $ as mathematics."""
    name = name if len(name) <= 48 else name[:47] + "…"
    return name.replace("$", r"\$").lstrip("_")
