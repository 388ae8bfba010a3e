"""A run that loses a node continues on the others: from the newest checkpoint, with the same data in the same order."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests import runs
from tests.launch import local_run
from tests.launch.slurm_cluster import free_ports, wait_for

pytestmark = pytest.mark.slow


def test_a_lost_node(tiny_data, tmp_path, straight):
    """Two nodes of one rank each (processes here); the second one is killed, and the first goes on alone."""
    run = tmp_path / "elastic"
    settings = {
        "NODES": "2", "MIN_NODES": "1", "RANKS_PER_NODE": "1", "RENDEZVOUS": f"127.0.0.1:{free_ports(1)[0]}", "JOB": "elastic",
        "LOCAL_ADDR": "127.0.0.1", "SLOW_STEP": "0.5", "SHUTDOWN_TIMEOUT": "5",
    }  # fmt: skip
    first = local_run.start(tiny_data, run, "checkpoint.keep=9", **settings, NODE_INDEX="0")
    second = local_run.start(tiny_data, run, "checkpoint.keep=9", **settings, NODE_INDEX="1")
    try:
        wait_for(
            lambda: (run / "metrics.jsonl").exists() and len(runs.rows(run)) >= 10,
            seconds=600, what=lambda: local_run.output(run),
        )  # fmt: skip
        for process in [second.pid, *local_run.below(second.pid)]:  # the first one hosts the rendezvous
            os.kill(process, signal.SIGKILL)
        assert local_run.finish(first) == 0, local_run.output(run)
    finally:
        for process in (first, second):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    rows, expected = runs.curve(run), runs.curve(straight)
    assert [row[:2] for row in rows] == [row[:2] for row in expected]  # global batch and data order did not change
    for row, other in zip(rows, expected):
        assert row[2] == pytest.approx(other[2], rel=1e-4)  # two ranks add in another order than one
    manifest = json.loads((run / "checkpoints" / "step_00000020" / "manifest.json").read_text())
    assert manifest["world_size"] == 1
    assert json.loads((run / "checkpoints" / "step_00000008" / "manifest.json").read_text())["world_size"] == 2
