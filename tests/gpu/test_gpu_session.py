"""The script for a session with one GPU: the order of its parts, and that one that fails costs only what needs it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_session.sh"
# in the place of the interpreter: writes down what it would run
PYTHON = """#!/usr/bin/env bash
case "$*" in -c*) echo 13; exit;; esac
echo "$*" >>"$CALLS"
case "$*" in *"$FAILS"*) echo no such package; exit 3;; esac
echo "done with $1"
"""


@pytest.mark.parametrize(
    "fails", ["nothing", "transformer-engine-torch", "throughput.py model --precision bf16 --device"]
)
def test_a_failed_part_costs_nothing_else(tmp_path, fails):
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)
    settings = {"OUT": str(tmp_path / "out"), "PYTHON": str(python), "CALLS": str(calls), "FAILS": fails, "TE": "9.9"}
    done = subprocess.run([str(SCRIPT)], env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (fails == "nothing"), done.stderr
    ran = calls.read_text().split("\n")
    order = ["--deselect", "model --precision bf16 --device", "layer --precision bf16", "transformer-engine-torch==9.9"]
    places = [next(i for i, words in enumerate(ran) if part in words) for part in order]
    assert places == sorted(places)
    fp8 = [words for words in ran if words.endswith("tests/gpu/test_fp8.py") and "--deselect" not in words]
    assert bool(fp8) == (fails != "transformer-engine-torch")
    table = (tmp_path / "out" / "table.txt").read_text()
    assert ("failed (3)" in table) == (fails != "nothing")
    assert "done with" in table


def test_one_part_at_a_time(tmp_path):
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)
    settings = {
        "OUT": str(tmp_path / "out"),
        "PYTHON": str(python),
        "CALLS": str(calls),
        "FAILS": "nothing",
        "TE": "9.9",
    }
    env = {**os.environ, **settings}
    for words, first, missing in ((["fp8"], "layer --device", "pip"), (["build"], "pip", "throughput.py")):
        subprocess.run([str(SCRIPT), *words], env=env, check=True, capture_output=True)
        ran = calls.read_text()
        assert first in ran.split("\n")[0]
        assert missing not in ran
        calls.unlink()
    assert (tmp_path / "out" / "table.txt").read_text().count("torch 13") == 2
    wrong = subprocess.run([str(SCRIPT), "bf8"], env=env, capture_output=True, text=True, check=False)
    assert (wrong.returncode, "bf8" in wrong.stderr, calls.exists()) == (2, True, False)
