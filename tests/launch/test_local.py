"""local.sh: several ranks, signals, and exit codes that say what status.json says."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests import runs
from tests.launch import local_run
from tests.launch.slurm_cluster import wait_for

pytestmark = pytest.mark.slow
CLOSE = {"rel": 1e-4}  # another number of ranks adds in another order, and 20 steps at a rate of 1e-2 let it grow


def test_preempted_and_again(tiny_data, tmp_path, straight):
    """First SIGTERM to the script alone, as Kubernetes and systemd send it; the save takes longer than torchrun's 30 s.

    Then to everybody: a scheduler signals every process, and torchrun passes its own on once more. The ranks save both times.
    """
    run = tmp_path / "run"
    settings = {"RANKS_PER_NODE": "2", "SLOW_STEP": "1"}
    job = local_run.start(tiny_data, run, "checkpoint.every=0", **settings, SLOW_SAVE="32")
    local_run.wait_until_it_trains(run)
    job.send_signal(signal.SIGTERM)
    assert local_run.finish(job) == 75, local_run.output(run)
    assert runs.status(run)["state"] == "preempted"
    saved = runs.status(run)["step"]
    job = local_run.start(tiny_data, run, "checkpoint.every=0", **settings)
    local_run.wait_until_it_trains(run, steps=saved + 2)
    for process in reversed([job.pid, *local_run.below(job.pid)]):
        os.kill(process, signal.SIGTERM)
    assert local_run.finish(job) == 75, local_run.output(run)
    assert runs.status(run)["state"] == "preempted"
    rows = runs.curve(run)
    assert len(rows) == runs.status(run)["step"] >= saved + 2
    expected = runs.curve(straight)[: len(rows)]
    assert [row[:2] for row in rows] == [row[:2] for row in expected]
    assert [row[2] for row in rows] == pytest.approx([row[2] for row in expected], **CLOSE)


def test_exit_codes(tiny_data, tmp_path):
    run = tmp_path / "run"
    assert local_run.finish(local_run.start(tiny_data, run, "train.stop_at=4")) == 0
    assert local_run.finish(local_run.start(tiny_data, run)) == 0
    assert runs.status(run)["state"] == "finished"
    assert local_run.finish(local_run.start(tiny_data, run)) == 0  # finished before
    assert local_run.finish(local_run.start(tiny_data, tmp_path / "wrong", "train.micro_batch_size=3")) == 2


def test_a_wrong_config_on_several_ranks(tiny_data, tmp_path):
    """torchrun ends with 1 then; Kubernetes must not start such a run again and again."""
    job = local_run.start(tiny_data, tmp_path / "wrong", "train.micro_batch_size=3", RANKS_PER_NODE="2")
    assert local_run.finish(job) == 2


def test_a_node_waits_for_the_first_one_as_long_as_it_is_told(tiny_data, tmp_path):
    """torchrun alone gives up after two or three minutes, which a large image takes to arrive."""
    shared = {"NODES": "2", "NODE_INDEX": "1", "RANKS_PER_NODE": "1", "RENDEZVOUS": "127.0.0.1:1", "JOB": "j"}
    begun = time.monotonic()
    job = local_run.start(tiny_data, tmp_path / "run", **shared, START_SECONDS="2")
    assert local_run.finish(job, 120) == 1
    assert time.monotonic() < begun + 100


def test_a_second_signal_ends_it_at_once(tiny_data, tmp_path):
    """Nothing is saved, and nothing is left behind."""
    run = tmp_path / "run"
    job = local_run.start(
        tiny_data, run, "checkpoint.every=0", "train.max_steps=500", RANKS_PER_NODE="2", SLOW_STEP="1", SLOW_SAVE="600"
    )  # fmt: skip
    local_run.wait_until_it_trains(run)
    processes = local_run.below(job.pid)
    job.send_signal(signal.SIGTERM)
    told = time.monotonic()
    wait_for(lambda: time.monotonic() > told + 3, seconds=300, what=str)  # sooner it counts as the same one
    job.send_signal(signal.SIGTERM)
    assert local_run.finish(job, 60) != 0
    gone = lambda: not any(os.path.exists(f"/proc/{process}") for process in processes)  # noqa: E731
    wait_for(gone, seconds=300, what=lambda: local_run.output(run))
