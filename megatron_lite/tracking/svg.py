"""Line charts as inline SVG, colored by the page's CSS variables, so that one drawing suits light and dark.

Notable:
  - long curves are thinned to the lowest and highest value of each bucket: spikes stay visible;
  - one path a curve and a hover title a point for sparse curves; no script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

MAX_POINTS = 800


@dataclass(frozen=True)
class Curve:
    """`style` is a CSS class; `points` marks the single values (validation)."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    style: str
    points: bool = False


@dataclass(frozen=True)
class Frame:
    """A chart's size in SVG units and the range of its axes."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]  # in log10 when `log`
    log: bool = False
    left: int = 58
    right: int = 14
    top: int = 12
    bottom: int = 34

    def at(self, step: float, value: float) -> tuple[float, float]:
        value = math.log10(value) if self.log else value
        across = (step - self.x[0]) / (self.x[1] - self.x[0])
        up = (value - self.y[0]) / (self.y[1] - self.y[0])
        return (
            self.left + across * (self.width - self.left - self.right),
            self.height - self.bottom - up * (self.height - self.top - self.bottom),
        )


def line_chart(curves: Sequence[Curve], *, label: str, width: int = 640, height: int = 300, zero: bool = False) -> str:
    """An <svg> with axes, or a sentence when there is nothing to draw. `zero`: the y axis starts at 0.

    The y axis is logarithmic when the values are positive and span more than a factor 50 (gradient norms).
    """
    curves = [curve for curve in curves if len(curve.steps)]
    if not curves:
        return '<p class="quiet">Nothing logged yet.</p>'
    frame = _frame(curves, width, height, zero)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">',
        *_grid(frame),
        *(_curve(frame, curve) for curve in curves),
        "</svg>",
    ]
    return "\n".join(parts)


def _frame(curves: Sequence[Curve], width: int, height: int, zero: bool) -> Frame:
    steps = [step for curve in curves for step in (curve.steps[0], curve.steps[-1])]
    low = min(min(curve.values) for curve in curves)
    high = max(max(curve.values) for curve in curves)
    log = not zero and low > 0 and high > 50 * low
    if log:
        low, high = math.log10(low), math.log10(high)
    low = min(low, 0.0) if zero else low
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    bottom = low if zero else low - margin
    x = (min(steps), max(steps)) if max(steps) > min(steps) else (min(steps) - 1, max(steps) + 1)
    return Frame(width, height, x, (bottom, high + margin), log)


def _grid(frame: Frame) -> list[str]:
    parts = []
    for value in _log_ticks(frame.y) if frame.log else ticks(*frame.y, count=6 if frame.height > 250 else 4):
        _, y = frame.at(frame.x[0], value)
        parts.append(f'<path class="grid" d="M{frame.left} {y:.1f}H{frame.width - frame.right}"/>')
        parts.append(f'<text x="{frame.left - 8}" y="{y:.1f}" dy=".35em" text-anchor="end">{number(value)}</text>')
    base = 10 ** frame.y[0] if frame.log else frame.y[0]
    steps = [step for step in ticks(*frame.x, count=5) if step == round(step)]
    last = steps[-1] if steps else None
    for step in steps:
        x, y = frame.at(step, base)
        end = "end" if x > frame.width - frame.right - 24 else "middle"
        label = f"step {number(step)}" if step == last else number(step)
        parts.append(f'<text x="{x:.1f}" y="{y + 22:.1f}" text-anchor="{end}">{label}</text>')
    return parts


def _curve(frame: Frame, curve: Curve) -> str:
    steps, values = thin(curve.steps, curve.values)
    places = [frame.at(step, value) for step, value in zip(steps, values)]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<path class="{curve.style}" d="{path}"><title>{escape(curve.name)}</title></path>']
    if len(steps) == 1 or (curve.points and len(steps) <= 60):
        for (x, y), step, value in zip(places, steps, values):
            title = f"{escape(curve.name)}, step {step:,}: {value:.4f}"
            parts.append(
                f'<circle class="{curve.style}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{title}</title></circle>'
            )
    return "".join(parts)


def thin(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most about `MAX_POINTS` points: the first, the last, and each bucket's lowest and highest, in order."""
    count = len(steps)
    if count <= MAX_POINTS:
        return list(steps), list(values)
    keep = {0, count - 1}
    buckets = MAX_POINTS // 2
    for b in range(buckets):
        inside = range(b * count // buckets, (b + 1) * count // buckets)
        keep.add(min(inside, key=values.__getitem__))
        keep.add(max(inside, key=values.__getitem__))
    order = sorted(keep)
    return [steps[i] for i in order], [values[i] for i in order]


def ticks(low: float, high: float, *, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) from low to high."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    gap = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.8)
    return [round(i * gap, 12) for i in range(math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9) + 1)]


def _log_ticks(span: tuple[float, float]) -> list[float]:
    powers = range(math.floor(span[0]), math.ceil(span[1]) + 1)
    return [10.0**p for p in powers if span[0] <= p <= span[1]]


def number(value: float) -> str:
    """A tick's label: 12,000 -> 12k, 0.0006 -> 6e-4."""
    if value == 0:
        return "0"
    size = abs(value)
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if letter == 'k' else unit):g}{letter}"
    if size < 1e-2:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"
