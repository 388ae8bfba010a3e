"""The rows of metrics.jsonl as curves: what loss.png and report.html draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_lite.tracking.base import Row

Points = tuple[list[int], list[float]]  # steps and values, of the same length


@dataclass
class Curves:
    """A run's rows, in the order of the file."""

    training: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)

    def column(self, key: str) -> Points:
        """Steps and finite values of a training column."""
        return _points((row["step"], row.get(key)) for row in self.training)

    def sources(self) -> list[str]:
        """Validation sources in the order of their first appearance."""
        return list(dict.fromkeys(source for row in self.validation for source in row["val_loss"]))

    def source(self, name: str) -> Points:
        """Steps and finite validation losses of a source."""
        return _points((row["step"], row["val_loss"].get(name)) for row in self.validation)

    def bits(self, name: str) -> float | None:
        """The newest bits per byte of a source; None where no row has them."""
        return next((b for row in reversed(self.validation) if (b := row.get("bits_per_byte", {}).get(name))), None)


def read_curves(rows: Iterable[Row]) -> Curves:
    """Split rows into training and validation; rows of neither kind are skipped."""
    curves = Curves()
    for row in rows:
        if not isinstance(row.get("step"), int):
            continue
        if "loss" in row:
            curves.training.append(row)
        elif isinstance(row.get("val_loss"), dict):
            curves.validation.append(row)
    return curves


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over a centered window of a fortieth of the curve; short curves stay as they are.

    A centered window leaves a straight line unchanged; a trailing one would lag behind a falling loss. At the start,
    where losses fall fast, the window is cut on both sides to stay centered; at the end, on the right side only.
    """
    half = len(values) // 80
    if half == 0:
        return list(values)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        reach = min(half, i)
        end = min(len(values), i + reach + 1)
        means.append((sums[end] - sums[i - reach]) / (end - i + reach))
    return means


def _points(pairs: Iterable[tuple[int, Any]]) -> Points:
    finite = [(step, value) for step, value in pairs if isinstance(value, (int, float)) and math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]
