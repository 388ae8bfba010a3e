"""The benchmark of what metrics, trackers and the watchdog cost: what the table makes of seconds, CPU of children, and real processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks import overhead
from benchmarks.overhead import ALONE, Spent, cpu_seconds, row

PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.3: pass\\ninput()"], stdin=subprocess.PIPE)
while time.process_time() < 0.2: pass
print("ready", flush=True)
input()
"""


def test_a_row():
    walls = [(1.0, 1.1), (2.0, 2.0), (1.0, 1.3)]
    turns = [{ALONE: Spent(without, 1.0), "console": Spent(wall, 1.01)} for without, wall in walls]
    assert row("console", turns, steps=2) == ["console", "1.100", "1.000 to 1.300", "1.010", "+5.0"]


def test_cpu_seconds_are_those_of_a_process_and_its_children():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        own = 0.19
        while cpu_seconds(process.pid) < own + 0.29:  # the child has its part
            assert process.poll() is None
        process.kill()


@pytest.mark.slow
def test_variants_take_turns(capsys):
    overhead.main(["--model", "tiny", "--turns", "2", "--steps", "1", "--only", "metrics.jsonl"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| metrics.jsonl"))
    assert float(line.split("|")[2]) > 0
