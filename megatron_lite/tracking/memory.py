"""The memory of a rank by part as a picture: a bar of what was planned, and one of what was measured, if it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lite.atomic import whole_file
from megatron_lite.tracking.plot import COLORS, INK, SVG, draw_svg, dress, figure_of

MEMORY_FILE = "memory.json"


def write_memory_plot(path: Path, parts: Mapping[str, float], *, title: str, available: float | None = None) -> Path:
    """Write a PNG of `parts` (name -> bytes), atomically. available: bytes of the device, drawn as a line."""
    with whole_file(path) as temporary, figure_of(8.4, 3.0) as figure:
        axes = figure.subplots()
        _draw(axes, parts, measured=None)
        if available:
            axes.axvline(available / 1e9, color=INK, linestyle="--", linewidth=1.2)
            axes.set_xlim(right=1.03 * max(available, sum(parts.values())) / 1e9)
        axes.set_title(title.replace("$", r"\$"), loc="left", fontsize=10, color=INK)
        figure.savefig(temporary, format="png", dpi=130, facecolor="white")
    return path


def memory_svg(parts: Mapping[str, float], measured: float | None) -> str:
    """An <svg> of the planned parts and the measured peak, in bytes."""
    with figure_of(8.8, 2.4, SVG) as figure:
        _draw(figure.subplots(), parts, measured=measured)
        return draw_svg(figure, "Memory of a rank by part")


def _draw(axes: Any, parts: Mapping[str, float], *, measured: float | None) -> None:
    from matplotlib.ticker import AutoLocator

    rows = ["planned"] if measured is None else ["measured", "planned"]
    left = 0.0
    for index, (part, size) in enumerate(parts.items()):
        color, hatch = COLORS[index % len(COLORS)], "//" if index >= len(COLORS) else None
        axes.barh(rows[-1:], [size / 1e9], left=left, color=color, hatch=hatch, label=f"{part} {size / 1e9:.3g}")
        left += size / 1e9
    if measured is not None:
        axes.barh(["measured"], [measured / 1e9], color=INK)
    axes.set_xlabel("GB")
    axes.figure.legend(loc="outside lower center", ncols=4, fontsize=8.5, frameon=False, labelcolor=INK)
    dress(axes)
    axes.xaxis.set_major_locator(AutoLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(left=0)
