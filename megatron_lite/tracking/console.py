"""The terminal: a header, a live progress bar with ETA, validation tables.

Notable:
  - when the output is not a terminal (a log file, Slurm) there is no bar: one plain line per logged step;
  - ETA = steps left * the median step time of the last ten rows (pauses for validation and saving not counted);
  - on resume the first validation losses come from metrics.jsonl, so the last table spans the whole run.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from megatron_lite.tracking.base import Row, RunInfo
from megatron_lite.tracking.jsonl import METRICS_FILE, read_rows


class ConsoleTracker:
    """Shows the run on a rich console (standard output by default)."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._step_seconds: deque[float] = deque(maxlen=10)
        self._run: RunInfo | None = None
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._bits: dict[str, float] = {}

    def start(self, run: RunInfo) -> None:
        self._run = run
        past = run.start_step - run.validation_due  # this job's own rows may be in the file already
        for row in read_rows(run.run_dir / METRICS_FILE):
            if row["step"] <= past and run.start_step:
                self._remember(row)
        self._header(run)
        if self.console.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                console=self.console,
                refresh_per_second=4,
                # or all that a training prints, torch's warnings too, would fail where the console fails
                redirect_stdout=False,
                redirect_stderr=False,
            )
            text = f"step {run.start_step}/{run.total_steps}"
            self._task = self._progress.add_task(text, total=run.total_steps, completed=run.start_step)
            self._progress.start()

    def log(self, row: Row) -> None:
        assert self._run is not None, "log() before start()"
        if "loss" in row:
            self._training(row, self._run.total_steps)
        elif "val_loss" in row:
            self._validation(row)

    def close(self, status: str) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._last:
            self.console.print(self._summary())
        self._run = None

    def _header(self, run: RunInfo) -> None:
        steps = f"{run.total_steps:,} steps"
        if run.total_tokens is not None:
            steps = f"{human(run.total_tokens)} ({steps})"
        lines = {
            "name": run.name,
            "model": run.model,
            "parameters": "" if run.parameters is None else f"{run.parameters:,}",
            "tokens": steps,
            "layout": run.layout,
            "MFU against": run.peak,
            "run": run.run_dir,
            "resumed": f"after step {run.start_step:,}" if run.start_step else "",
        }
        for key, value in lines.items():
            if value:
                self._print(f"{key:<12} {value}")

    def _training(self, row: Row, total: int) -> None:
        if row.get("step_seconds") is not None:
            self._step_seconds.append(row["step_seconds"])
        left = (total - row["step"]) * median(self._step_seconds) if self._step_seconds else None
        line = describe(row, total, left)
        if self._progress is None:
            self._print(line)
        else:
            shown = {key: row.get(key) for key in ("step", "loss", "tokens_per_second", "mfu", "tflops_per_device")}
            bar_text = describe(shown, total, left)
            self._progress.update(self._task, completed=row["step"], description=bar_text)
        if row.get("skipped_steps"):
            why = "a spike, or not finite" if row.get("spikes") else "loss or gradient was not finite"
            self._print(f"step {row['step']}: {row['skipped_steps']} skipped, {why}")

    def _validation(self, row: Row) -> None:
        if not row["val_loss"]:
            return
        before = dict(self._last)
        self._remember(row)
        table = _table(
            f"validation after step {row['step']:,}", ("source", "loss", "perplexity", "bits per byte", "change")
        )
        bits = row.get("bits_per_byte") or {}
        for source, loss in row["val_loss"].items():
            change = f"{loss - before[source]:+.4f}" if source in before else ""
            table.add_row(Text(source), f"{loss:.4f}", perplexity(loss), number(bits.get(source)), change)
        self.console.print(table)

    def _summary(self) -> Table:
        table = _table(
            "validation loss by source", ("source", "first", "last", "change", "perplexity", "bits per byte")
        )
        for source, last in self._last.items():
            first = self._first[source]
            bits = number(self._bits.get(source))
            cells = (f"{first:.4f}", f"{last:.4f}", f"{last - first:+.4f}", perplexity(last), bits)
            table.add_row(Text(source), *cells)
        return table

    def _remember(self, row: Row) -> None:
        for source, loss in (row.get("val_loss") or {}).items():
            self._first.setdefault(source, loss)
            self._last[source] = loss
        self._bits.update(row.get("bits_per_byte") or {})

    def _print(self, text: str) -> None:
        """Print text as it is: no markup, and no line of a log file is wrapped."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe(row: dict[str, Any], total: int, eta: float | None) -> str:
    """One line: `step 40/200  loss 5.123  grad_norm 0.81  lr 3.00e-04  tok/s 4,321  mfu 31.2%  eta 01:23`."""
    parts = [f"step {row['step']}/{total}", f"loss {row['loss']:.4f}"]
    if row.get("grad_norm") is not None:
        parts.append(f"grad_norm {row['grad_norm']:.3f}")
    if row.get("lr") is not None:
        parts.append(f"lr {row['lr']:.2e}")
    if row.get("tokens_per_second") is not None:
        parts.append(f"tok/s {row['tokens_per_second']:,.0f}")
    if row.get("mfu") is not None:
        parts.append(f"mfu {row['mfu']:.1%}")
    elif row.get("tflops_per_device") is not None:  # of a device whose peak is not known
        parts.append(f"{row['tflops_per_device']:.3g} TFLOP/s")
    parts.append(f"eta {clock(eta)}")
    return "  ".join(parts)


def clock(seconds: float | None) -> str:
    """01:23, 1:02:03 or 2d 03:04; --:-- when unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "--:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute:02d}:{second:02d}"


def human(count: float) -> str:
    """1,234,567 -> 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(count) >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:g}"


def perplexity(loss: float) -> str:
    """e^loss, rounded for reading."""
    value = math.exp(loss) if loss < 700 else math.inf  # e^710 overflows
    return f"{value:,.4g}" if value < 1e3 else f"{value:,.0f}" if value < 1e7 else f"{value:.3g}"


def number(value: float | None) -> str:
    """Four decimals; nothing where there is no value."""
    return "" if value is None else f"{value:.4f}"


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table
