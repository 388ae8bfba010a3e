"""What a demo prints and leaves behind: intervals over seeds, a table, a plot, and where and how it was measured.

    options = options_of(__doc__, name="fp8")          # --size, --folder, --jobs, and overrides of every run
    gap = paired_gap(bf16, fp32)                        # Interval: mean and half-width over paired seeds
    write_summary(options, "fp8", text=markdown(("arm", "gap"), rows), data={...})

The interval is Student's: mean +- t(0.975, n - 1) s / sqrt(n), with s the standard deviation over n seeds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import Points
from megatron_lite.atomic import whole_file
from megatron_lite.errors import CheckpointError, WorkFailedError, error_text
from megatron_lite.tracking.jsonl import encode_row
from megatron_lite.tracking.plot import COLORS, DASHES

SIZES = ("full", "small", "tiny")


@dataclass(frozen=True)
class Interval:
    """A 95 % interval. half is infinite where there is one value only; mean is NaN where a run diverged."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def text(self, form: str = ".4f", *, scale: float = 1.0) -> str:
        """`mean ± half`, both multiplied by `scale`; the mean alone of a single seed, and `diverged` for NaN."""
        if math.isnan(self.mean):
            return "diverged"
        mean = format(scale * self.mean, form)
        return (
            f"{mean} ± {format(scale * self.half, form.lstrip('+'))}"
            if math.isfinite(self.half)
            else f"{mean} (one seed)"
        )


def interval(values: Sequence[float]) -> Interval:
    """Mean and half-width over independent values. Raises ValueError if there are none."""
    if not values:
        raise ValueError("an interval needs at least one value")
    mean, n = statistics.fmean(values), len(values)
    if n == 1 or not math.isfinite(mean):
        return Interval(mean, math.inf)
    return Interval(mean, t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n))


def paired_gap(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """The relative gap value / baseline - 1 over pairs of the same seed."""
    return interval([value / base - 1 for value, base in zip(values, baseline, strict=True)])


def t_quantile(degrees: int, *, confidence: float = 0.95) -> float:
    """t with P(|T| < t) = confidence for Student's T, by bisection.

    With T = sqrt(degrees) tan(a), the density of the angle is cos(a)^(degrees - 1): smooth, and on a finite range.
    """

    def area(angle: float, steps: int = 2000) -> float:  # Simpson's rule from 0 to `angle`
        heights = [math.cos(angle * i / steps) ** (degrees - 1) for i in range(steps + 1)]
        return angle / steps / 3 * (heights[0] + 4 * sum(heights[1::2]) + 2 * sum(heights[2:-1:2]) + heights[-1])

    low, high, whole = 0.0, math.pi / 2, area(math.pi / 2)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if area(middle) < confidence * whole else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


@dataclass(frozen=True)
class Options:
    """size: one of SIZES. arms: the names that were chosen. overrides: words that follow those of every arm. seeds: of each arm."""

    size: str
    folder: Path
    jobs: int
    arms: tuple[str, ...]
    overrides: tuple[str, ...]
    seeds: int = 1


def options_of(
    description: str | None,
    *,
    name: str,
    arms: tuple[Sequence[str], Sequence[str]] = ((), ()),
    seeds: Mapping[str, int] | None = None,
    arguments: Sequence[str] | None = None,
) -> Options:
    """Parse the command line of a demo; the folder is runs/<name>/<size> if none is given. `-- words` are overrides of every run.

    arms: the names that `--arms` may choose from, and those that are run without it. seeds: of each size, and without `--seeds`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument(
        "--folder", type=Path, help=f"default: runs/{name}/<size>; run again with the same one to continue"
    )
    parser.add_argument(
        "--jobs", type=count, help="runs at the same time, one thread each; default: the number of cores"
    )
    if arms[0]:
        parser.add_argument("--arms", nargs="+", choices=arms[0], default=arms[1], help="which runs to compare")
    if seeds:
        parser.add_argument("--seeds", type=count, help="runs of each arm; default: as many as the size has")
    parser.add_argument("overrides", nargs="*", help="after `--`: overrides for every run")
    found = parser.parse_args(arguments)
    jobs = found.jobs or (1 if found.size == "tiny" else (os.cpu_count() or 1))
    number = (found.seeds or seeds[found.size]) if seeds else 1
    folder = found.folder or Path("runs") / name / found.size
    chosen = tuple(found.arms) if arms[0] else ()
    return Options(found.size, folder, jobs, arms=chosen, overrides=tuple(found.overrides), seeds=number)


def count(text: str) -> int:
    """A whole number of at least 1, as the `type` of an argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def machine() -> dict[str, Any]:
    """Where, when and by which command. `load`: how many processes wanted a core in the last minute, to be read beside `cores`."""
    model = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
        "processor": model[0] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def heading(**more: Any) -> str:
    """The first line of a benchmark's output: `machine()` and what else its numbers depend on."""
    return "; ".join(f"{key} {value}" for key, value in (machine() | more).items())


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def plot(path: Path, series: Mapping[str, Sequence[Points]], *, title: str, ylabel: str) -> None:
    """A PNG of loss over tokens: for each label the mean over its seeds' curves, with a band from the least to the largest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5), layout="constrained")
    axes = figure.subplots()
    for i, (label, curves) in enumerate(series.items()):
        length = min(len(curve) for curve in curves)
        tokens = [point[0] for point in curves[0][:length]]
        by_token = [[curve[k][1] for curve in curves] for k in range(length)]
        style = {"color": COLORS[i % 8], "linestyle": DASHES[i // 8 % 4]}
        axes.plot(tokens, [statistics.fmean(values) for values in by_token], label=label, linewidth=1.6, **style)
        axes.fill_between(
            tokens, [min(v) for v in by_token], [max(v) for v in by_token], color=style["color"], alpha=0.15
        )
    axes.set(title=title, xlabel="tokens", ylabel=ylabel)
    axes.grid(alpha=0.4)
    axes.legend(frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def write_summary(options: Options, name: str, *, text: str, data: Mapping[str, Any]) -> None:
    """Print `text` (Markdown) and write it to <folder>/<name>.md, and `data` to <name>.json; both say where they were measured."""
    where = machine() | {"size": options.size}
    text = f"{text}\n{heading(size=options.size)}\n"
    print(text, flush=True)
    for suffix, content in ((".md", text), (".json", _as_json({"machine": where, **data}))):
        with whole_file(options.folder / f"{name}{suffix}") as temporary:
            temporary.write_text(content)


def run_demo(main: Callable[[], None]) -> None:
    """Call `main`; a user's error, or a run that failed, becomes one line and exit code 1."""
    try:
        main()
    except WorkFailedError as error:
        sys.exit(f"failed: {error}")
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"error: {error_text(error)}")


def _as_json(data: Mapping[str, Any]) -> str:
    """NaN and infinities as in metrics.jsonl: as strings."""
    return json.dumps(json.loads(encode_row(dict(data))), indent=2) + "\n"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().split("\n") if Path(path).exists() else []


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]
