"""report.html: a run on one page, from its run directory alone.

Notable:
  - self-contained: inline style and SVG, no script, nothing fetched; light or dark as the reader's system is;
  - works at any moment of a run, with whatever is there: metrics.jsonl, status.json, config.yaml, checkpoints;
  - everything from the files is escaped.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from fractions import Fraction
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from megatron_lite.atomic import whole_file
from megatron_lite.tracking.console import clock, human, number, perplexity
from megatron_lite.tracking.curves import Curves, read_curves, smooth
from megatron_lite.tracking.jsonl import METRICS_FILE, read_rows
from megatron_lite.tracking.memory import MEMORY_FILE, memory_svg
from megatron_lite.tracking.page import chart, key, page, table
from megatron_lite.tracking.plot import COLORS, column_svg, loss_svg


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html`, atomically, and return its path.

    status.json may have `blend_seen`: {source: {samples, share, target, epochs}} (share and target from 0 to 1).
    """
    run_dir = Path(run_dir)
    status = _read_json(run_dir / "status.json")
    curves = read_curves(read_rows(run_dir / METRICS_FILE))
    manifests = _manifests(run_dir)
    newest = manifests[-1][1] if manifests else {}
    sections = [
        _header(run_dir, status),
        _tiles(curves, status, newest),
        _losses(curves),
        _small_charts(curves),
        _memory(_read_json(run_dir / MEMORY_FILE)),
        _blend(status.get("blend_seen"), newest),
        _precision_events(newest.get("precision_events")),
        _checkpoints(manifests),
        _config(run_dir / "config.yaml"),
    ]
    path = run_dir / "report.html"
    with whole_file(path) as temporary:
        temporary.write_text(page(run_dir.resolve().name, "\n".join(sections)), encoding="utf-8")
    return path


def _header(run_dir: Path, status: dict[str, Any]) -> str:
    state = str(status.get("state", "unknown"))
    known = state if state in ("running", "preempted", "finished", "failed") else "unknown"
    reason = str(status.get("reason") or "")
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"<header><h1>{escape(run_dir.resolve().name)}</h1>"
        f'<p><span class="state {known}">{escape(state)}</span> {escape(reason)}</p>'
        f'<p class="quiet">Written {written}</p></header>'
    )


def _tiles(curves: Curves, status: dict[str, Any], manifest: dict[str, Any]) -> str:
    last = curves.training[-1] if curves.training else {}
    step = last.get("step", status.get("step"))
    tiles = [("steps", "n/a" if step is None else f"{step:,}")]
    if isinstance(parameters := manifest.get("parameters"), int):
        tiles.append(("parameters", f"{parameters:,}"))
    if tokens := last.get("consumed_tokens"):
        tiles.append(("tokens seen", human(tokens)))
    if losses := curves.column("loss")[1]:
        tiles.append(("training loss", f"{smooth(losses)[-1]:.3f}"))
    if final := [curves.source(source)[1][-1] for source in curves.sources() if curves.source(source)[1]]:
        tiles.append(("validation, mean of sources", f"{sum(final) / len(final):.3f}"))
    tiles.append(("training time", clock(_training_seconds(curves))))
    if speeds := curves.column("tokens_per_second")[1]:
        tiles.append(("tokens per second", f"{median(speeds):,.0f}"))
    if mfu := curves.column("mfu")[1]:
        tiles.append(("MFU, data sheet peak", f"{median(mfu):.1%}"))
    elif flops := curves.column("tflops_per_device")[1]:
        tiles.append(("TFLOP/s per device", f"{median(flops):.3g}"))
    if memory := curves.column("memory_gib")[1]:
        tiles.append(("peak memory", f"{max(memory):.2f} GiB"))
    cells = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def _training_seconds(curves: Curves) -> float:
    """Each row's mean step time, times the number of steps that it covers."""
    total, before = 0.0, 0
    for step, seconds in zip(*curves.column("step_seconds")):
        total += seconds * (step - before)
        before = int(step)
    return total


def _losses(curves: Curves) -> str:
    if not curves.training and not curves.validation:
        return '<section><h2>Loss by source</h2><p class="quiet">Nothing logged yet.</p></section>'
    rows = [[key(None) + "training", *_first_last(curves.column("loss")[1]), ""]]
    for i, source in enumerate(curves.sources()):
        rows.append([key(i) + escape(source), *_first_last(curves.source(source)[1]), number(curves.bits(source))])
    losses = table(("source", "first", "last", "change", "perplexity", "bits per byte"), rows)
    return f"<section><h2>Loss by source</h2>{chart(loss_svg(curves))}{losses}</section>"


def _first_last(values: list[float]) -> list[str]:
    if not values:
        return ["n/a"] * 4
    first, last = values[0], values[-1]
    return [f"{first:.4f}", f"{last:.4f}", f"{last - first:+.4f}", perplexity(last)]


def _small_charts(curves: Curves) -> str:
    charts = []
    for title, column, color, zero in (
        ("Learning rate", "lr", COLORS[0], True),
        ("Gradient norm", "grad_norm", COLORS[1], False),
        ("Tokens per second", "tokens_per_second", COLORS[2], True),
        ("Seconds per step", "step_seconds", COLORS[6], True),
    ):
        if curves.column(column)[1]:
            svg = column_svg(curves, column, title=title, color=color, zero=zero)
            charts.append(f"<section><h2>{title}</h2>{chart(svg)}</section>")
    return f'<div class="pair">{"".join(charts)}</div>'


def _memory(plan: dict[str, Any]) -> str:
    """What was planned by part, beside the measured peak: `training/memory_check.py` writes it."""
    parts, measured = plan.get("planned"), plan.get("measured")
    if not isinstance(parts, dict) or not parts or not isinstance(measured, int | float):
        return ""
    rows = [[escape(str(part)), _bytes(size)] for part, size in parts.items()]
    rows += [["planned, all", _bytes(sum(parts.values()))], ["measured", _bytes(measured)]]
    listed = table((f"memory of a rank, {plan.get('moment', '')}", "size"), rows)
    return f"<section><h2>Memory of a rank, planned</h2>{chart(memory_svg(parts, measured))}{listed}</section>"


def _blend(seen: Any, manifest: dict[str, Any]) -> str:
    parts = []
    if isinstance(seen, dict) and seen:
        full = max(float(facts.get(key, 0)) for facts in seen.values() for key in ("share", "target")) or 1.0
        rows = [_blend_row(source, facts, full=full) for source, facts in seen.items()]
        parts.append(table(("source", "samples", "share", "target", "difference", "epochs", ""), rows))
    phases = manifest.get("data", {}).get("phases")
    if isinstance(phases, list) and len(phases) > 1:
        parts.append("<h3>Phases, as planned</h3>" + _phases(phases))
    if not parts:
        return ""
    return f"<section><h2>Blend seen</h2>{''.join(parts)}</section>"


def _blend_row(source: str, facts: dict[str, Any], *, full: float) -> list[str]:
    """The last cell is a bar of the share with a mark at the target; `full` is the share of a full bar."""
    share, target = float(facts.get("share", 0)), float(facts.get("target", 0))
    fill, mark = f"width: {100 * share / full:.1f}%", f"left: {99 * target / full:.1f}%"
    return [
        escape(source),
        f"{int(facts.get('samples', 0)):,}",
        f"{share:.2%}",
        f"{target:.2%}",
        f"{100 * (share - target):+.2f} pt",
        f"{float(facts.get('epochs', 0)):.2f}",
        f'<div class="bar"><i style="{fill}"></i><b style="{mark}"></b></div>',
    ]


def _phases(phases: list[dict[str, Any]]) -> str:
    sources = list(dict.fromkeys(source for phase in phases for source in phase.get("shares", {})))
    head = ("source", *(f"from sample {phase.get('start', 0):,}" for phase in phases))
    rows = []
    for source in sources:
        shares = [phase.get("shares", {}).get(source, "0") for phase in phases]
        rows.append([escape(source), *(f"{float(Fraction(str(share))):.2%}" for share in shares)])
    return table(head, rows)


def _precision_events(events: Any) -> str:
    """What an FP8 run found out about its spikes, from the newest checkpoint: a rollback keeps this, not the rows."""
    if not isinstance(events, list) or not events:
        return ""
    keys = ("step", "module", "operand", "why", "rung")
    rows = [[escape(str(event.get(key, ""))) for key in keys] for event in events if isinstance(event, dict)]
    listed = table(("step", "first module out of line", "operand", "why", "computes on in"), rows)
    return f"<section><h2>Spikes in FP8</h2>{listed}</section>"


def _checkpoints(manifests: list[tuple[Path, dict[str, Any]]]) -> str:
    if not manifests:
        return '<section><h2>Checkpoints</h2><p class="quiet">None yet.</p></section>'
    rows = []
    for path, manifest in reversed(manifests):
        files = [file for file in path.iterdir() if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        saved = datetime.fromtimestamp((path / "manifest.json").stat().st_mtime, UTC)
        consumed = manifest.get("consumed_samples")
        samples = f"{consumed:,}" if isinstance(consumed, int) else ""
        rows.append([escape(path.name), samples, str(len(files)), _bytes(size), f"{saved:%Y-%m-%d %H:%M} UTC"])
    listed = table(("checkpoint", "samples", "files", "size", "saved"), rows)
    return f"<section><h2>Checkpoints</h2>{listed}</section>"


def _config(path: Path) -> str:
    if not path.exists():
        return ""
    text = escape(path.read_text(encoding="utf-8", errors="replace"))
    return f"<section><details><summary><h2>Config</h2></summary><pre>{text}</pre></details></section>"


def _manifests(run_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Complete checkpoints in the order of their steps. They are listed, not verified."""
    found = sorted((run_dir / "checkpoints").glob("step_*/manifest.json"))
    return [(file.parent, _read_json(file)) for file in found]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):  # not there, or damaged: a report shows what there is
        return {}
    return value if isinstance(value, dict) else {}


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
