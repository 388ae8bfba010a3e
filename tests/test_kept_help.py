"""The text of `--help` is kept: the same text without torch, until a source changes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_lite import cli
from megatron_lite import kept_help as module
from megatron_lite.kept_help import keep_help, kept_help

KEPT_ONLY = """
import sys
from megatron_lite.cli import main
sys.argv = ["mlite", "train", "--help"]
main()
assert "torch" not in sys.modules
assert "hydra" not in sys.modules
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A home of this test's own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_the_next_help_is_the_same_text_without_torch(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mlite", "train", "--help"])
    cli.main()
    composed = capsys.readouterr().out
    assert "max_steps: null" in composed
    again = subprocess.run([sys.executable, "-c", KEPT_ONLY], capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout, again.stderr) == (0, composed, "")


@pytest.mark.parametrize("change", ["a line more", "a file more", "a later time", "a file in data_tools"])
def test_a_changed_source_is_noticed(change, tmp_path, monkeypatch):
    package, tools = tmp_path / "megatron_lite", tmp_path / "data_tools"
    for folder in (package, tools, tmp_path / "configs"):
        folder.mkdir()
        (folder / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(module, "_PACKAGE", package)
    keep_help("train", "two\nlines")
    assert kept_help("train") == "two\nlines"
    assert kept_help("evaluate") is None
    if change == "a later time":
        os.utime(package / "a.py", ns=(1, 1))
    else:
        path = {"a line more": package / "a.py", "a file more": package / "b.py"}.get(change, tools / "a.py")
        path.write_text("x = 12\n")
    assert kept_help("train") is None


def test_a_home_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "home").write_text("a file where the folder would be")
    keep_help("train", "text")
    assert kept_help("train") is None
