from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_lite.tracking import write_loss_plot, write_report
from megatron_lite.tracking.jsonl import METRICS_FILE, encode_row

EVIL = "<script>alert('x')</script>&\"source\""
VOID = {"meta", "link", "img", "br", "hr"}


class Page(HTMLParser):
    """An independent reader: checks nesting, gathers tags, text and table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.titles: list[str] = []  # within charts, shown on hover
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open[-2:] == ["g", "title"]:
            self.titles.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == first)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run_dir = tmp_path / "smoke & <b>"
    rows: list[dict] = []
    for step in range(1, 101):
        rows.append(
            {
                "step": step,
                "consumed_samples": 8 * step,
                "consumed_tokens": 2048 * step,
                "loss": float("nan") if step == 50 else 5 - step / 50,
                "grad_norm": 1.0,
                "lr": 1e-3,
                "step_seconds": 0.5,
                "tokens_per_second": 4096.0,
                "mfu": 0.25,
                "memory_gib": 1.5,
            }
        )
    losses = [{"step": i, "val_loss": {EVIL: 4 - i / 50, "python": 3.0}} for i in (50, 100)]
    rows += [row | {"bits_per_byte": {EVIL: row["val_loss"][EVIL] * 0.4375}} for row in losses]
    run_dir.mkdir()
    (run_dir / METRICS_FILE).write_bytes(b"".join(encode_row(row) for row in rows))
    status = {"state": "preempted", "step": 100, "reason": "SIGTERM <i>", "blend_seen": {}}
    status["blend_seen"] = {
        EVIL: {"samples": 1500, "share": 0.75, "target": 0.7, "epochs": 1.25},
        "python": {"samples": 500, "share": 0.25, "target": 0.3, "epochs": 0.1},
    }
    (run_dir / "status.json").write_text(json.dumps(status))
    (run_dir / "config.yaml").write_text("a: '</pre><script>'\nseed: 1234\n")
    for step in (50, 100):
        folder = run_dir / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        phases = [
            {"start": 0, "shares": {EVIL: "7/10", "python": "3/10"}},
            {"start": 600, "shares": {EVIL: "1/2", "python": "1/2"}},
        ]
        manifest = {"step": step, "consumed_samples": 8 * step, "parameters": 12_345_678, "data": {"phases": phases}}
        manifest["precision_events"] = [
            {"step": 40, "module": EVIL, "operand": "input", "why": "not finite", "rung": "bf16"}
        ]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "model.safetensors").write_bytes(bytes(3 * 2**20))
    (run_dir / "checkpoints" / ".tmp-step_00000150").mkdir()
    return run_dir


def test_the_page_says_what_the_run_directory_says(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.row("training")[1:4] == ["4.9800", "3.0000", "-1.9800"]
    assert page.row(EVIL) == [EVIL, "3.0000", "2.0000", "-1.0000", "7.389", "0.8750"]
    blend = [row for row in page.rows if row[0] == EVIL][1]
    assert blend[1:6] == ["1,500", "75.00%", "70.00%", "+5.00 pt", "1.25"]
    phases = [row for row in page.rows if row[0] == "python"][-1]
    assert phases == ["python", "30.00%", "50.00%"]
    assert page.row("40") == ["40", EVIL, "input", "not finite", "bf16"]
    assert [row[:4] for row in page.rows if row[0].startswith("step_")] == [
        ["step_00000100", "800", "2", "3.0 MiB"],
        ["step_00000050", "400", "2", "3.0 MiB"],
    ]
    for text in (
        "preempted",
        "SIGTERM <i>",
        "smoke & <b>",
        "12,345,678",
        "205K",
        "00:50",
        "data sheet peak",
        "1.50 GiB",
    ):
        assert text in page.text
    assert "a: '</pre><script>'\nseed: 1234" in page.text
    charts = [found for tag, found in page.tags if tag == "svg" and "by step" in found.get("aria-label", "")]
    assert len(charts) == 5


def test_nothing_is_fetched_and_nothing_runs(run_dir: Path) -> None:
    text = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "image", "a"}
    links = [attributes[key] for _, attributes in page.tags for key in ("href", "xlink:href") if key in attributes]
    assert all(link.startswith("#") for link in links)  # within the page
    assert not any(key in attributes for _, attributes in page.tags for key in ("src", "onload", "onclick"))
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_charts_follow_the_page_into_the_dark(run_dir: Path) -> None:
    text = write_report(run_dir).read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text
    charts = text.partition("</style>")[2]
    assert not re.search(r"(stroke|fill): #", charts)  # no fixed color
    used = set(re.findall(r"var\(--(\w+)\)", charts))
    assert used >= {"ink", "line", "s0", "s1"}
    for variables in re.findall(r":root \{(.*?)\}", text, re.DOTALL):
        assert used <= set(re.findall(r"--(\w+):", variables))


def test_names_of_any_script_and_length(run_dir: Path, recwarn: pytest.WarningsRecorder) -> None:
    names = ["中文維基", "русский", "_hidden $x$", "x" * 300, "<i>&", *(f"n{i}" for i in range(4))]
    rows = [{"step": step, "val_loss": {name: 2.0 + i for i, name in enumerate(names)}} for step in (1, 2)]
    (run_dir / METRICS_FILE).write_bytes(b"".join(map(encode_row, rows)))
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    for name in names:
        assert page.row(name)[1] == f"{2.0 + names.index(name):.4f}"
        assert name in page.titles
    write_loss_plot(run_dir)
    assert list(recwarn) == []


def test_an_empty_or_damaged_run_has_a_report_too(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path).read_text())
    assert "Nothing logged yet." in page.text
    (tmp_path / "status.json").write_text('{"state": "fini')
    (tmp_path / METRICS_FILE).write_bytes(encode_row({"step": 1, "loss": float("nan")}) + b'{"step": 2, "lo')
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000001" / "manifest.json").write_text("[]")
    page = Page(write_report(tmp_path).read_text())
    assert "unknown" in page.text
    assert "step_00000001" in page.text
