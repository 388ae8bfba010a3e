from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from megatron_lite.tracking import ConsoleTracker, RunInfo
from megatron_lite.tracking.console import clock, describe, human, perplexity
from megatron_lite.tracking.jsonl import METRICS_FILE, encode_row

ROW = {
    "step": 40,
    "loss": 5.123,
    "grad_norm": 0.5,
    "lr": 3e-4,
    "step_seconds": 0.5,
    "tokens_per_second": 4321.0,
    "mfu": 0.312,
}


def play(tmp_path: Path, rows: list[dict], *, terminal: bool = False, start: int = 0) -> str:
    out = io.StringIO()
    tracker = ConsoleTracker(Console(file=out, force_terminal=terminal, width=100, color_system=None))
    info = RunInfo(
        run_dir=tmp_path,
        name="smoke",
        total_steps=200,
        start_step=start,
        model="nemotron4 [tiny]",
        parameters=1_234_567,
        total_tokens=200_000,
        layout="fsdp, dp 2 x tp 1",
        peak="measured: somehow",
    )
    tracker.start(info)
    for row in rows:
        tracker.log(row)
    tracker.close("finished")
    return out.getvalue()


def test_without_a_terminal_there_is_one_plain_line_per_row(tmp_path: Path) -> None:
    text = play(tmp_path, [ROW, {**ROW, "step": 80, "mfu": None, "tflops_per_device": 0.05}])
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    assert lines == [
        "step 40/200  loss 5.1230  grad_norm 0.500  lr 3.00e-04  tok/s 4,321  mfu 31.2%  eta 01:20",
        "step 80/200  loss 5.1230  grad_norm 0.500  lr 3.00e-04  tok/s 4,321  0.05 TFLOP/s  eta 01:00",
    ]
    assert "\x1b" not in text
    for expected in (
        "nemotron4 [tiny]",
        "1,234,567",
        "200K (200 steps)",
        "fsdp, dp 2 x tp 1",
        "measured: somehow",
    ):
        assert expected in text


def test_the_bar_shows_progress_and_eta(tmp_path: Path) -> None:
    text = play(tmp_path, [ROW], terminal=True)
    assert "step 40/200  loss 5.1230  tok/s 4,321  mfu 31.2%  eta 01:20" in text
    assert "nemotron4 [tiny]" in text


def test_validation_tables_by_source(tmp_path: Path) -> None:
    rows = [{"step": 1, "val_loss": {"en": 2.0, "de": 3.0}}, {"step": 2, "val_loss": {"en": 1.5, "de": 3.25}}]
    text = play(tmp_path, rows)
    second, last = text.split("after step 2")[1].split("validation loss by source")
    assert re.search(r"en +1\.5000 +4\.482 +-0\.5000", second)
    assert re.search(r"de +3\.2500 +25\.79 +\+0\.2500", second)
    assert re.search(r"en +2\.0000 +1\.5000 +-0\.5000 +4\.482", last)
    assert re.search(r"de +3\.0000 +3\.2500 +\+0\.2500 +25\.79", last)


def test_bits_per_byte_stand_beside_perplexity(tmp_path: Path) -> None:
    text = play(tmp_path, [{"step": 1, "val_loss": {"en": 2.0}, "bits_per_byte": {"en": 0.875}}])
    assert re.search(r"en +2\.0000 +7\.389 +0\.8750", text)
    assert re.search(r"en +2\.0000 +2\.0000 +\+0\.0000 +7\.389 +0\.8750", text)


def test_the_last_table_spans_a_resumed_run(tmp_path: Path) -> None:
    """The record may be ahead: it has this job's first rows already."""
    past = [{"step": 0, "val_loss": {"en": 9.0}}, {"step": 60, "val_loss": {"en": 4.0, "de": 3.0}}]
    (tmp_path / METRICS_FILE).write_bytes(b"".join(map(encode_row, past)))
    text = play(tmp_path, [{"step": 60, "val_loss": {"en": 4.0}}], start=50)
    assert re.search(r"en +9\.0000 +4\.0000 +-5\.0000", text.split("validation loss by source")[1])
    assert re.search(r"resumed +after step 50", text)
    assert not re.search(r"^ *de ", text, re.MULTILINE)


@pytest.mark.parametrize("terminal", [False, True])
def test_skipped_and_not_finite_steps_are_said(tmp_path: Path, terminal: bool) -> None:
    nan = float("nan")
    row = {**ROW, "loss": nan, "grad_norm": float("inf"), "skipped_steps": 2}
    text = play(tmp_path, [row, {"step": 40, "val_loss": {"en": nan}}], terminal=terminal)
    assert "step 40: 2 skipped" in text
    assert "loss nan" in text


def test_eta_follows_the_median_of_the_last_rows(tmp_path: Path) -> None:
    slow = {**ROW, "step": 1, "step_seconds": 60.0}
    rows = [slow, *({**ROW, "step": step, "step_seconds": 1.0} for step in range(2, 100))]
    text = play(tmp_path, [*rows, *({**ROW, "step": step, "step_seconds": 2.0} for step in range(100, 110))])
    eta = {int(step): found for step, found in re.findall(r"step (\d+)/200 .* eta (\S+)", text)}
    assert (eta[1], eta[3], eta[99], eta[109]) == ("3:19:00", "03:17", "01:41", "03:02")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00"), (83.4, "01:23"), (3723, "1:02:03"), (183840, "2d 03:04"), (None, "--:--"), (float("inf"), "--:--")],
)
def test_clock(seconds: float | None, text: str) -> None:
    assert clock(seconds) == text


def test_numbers_for_people() -> None:
    assert [human(n) for n in (7, 1234, 15_628_775_424, 8e12)] == ["7", "1.23K", "15.6B", "8T"]
    assert [perplexity(x) for x in (0.0, 5.0, 9.0, 20.0, 1000.0)] == ["1", "148.4", "8,103", "4.85e+08", "inf"]
    assert describe({"step": 1, "loss": 2.0}, 5, None) == "step 1/5  loss 2.0000  eta --:--"
