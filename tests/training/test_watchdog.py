"""Hangs name their culprit, slow ranks are reported; a run without either is left alone."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_lite.errors import TrainingFailedError
from megatron_lite.parallel import collectives
from megatron_lite.runtime import Runtime
from megatron_lite.training import metrics
from megatron_lite.training.reporting import reported
from megatron_lite.training.status import Status
from megatron_lite.training.trainer import Position
from megatron_lite.training.watchdog import Watchdog, WatchdogConfig, numbers, place, slow_ranks, waits_for_others
from tests import runs
from tests.launch import local_run


def test_slow_ranks():
    assert slow_ranks({0: 1.0, 1: 1.1, 2: 4.0, 3: 2.0}, 1.5) == [2, 3]
    assert slow_ranks({0: 1.0, 1: 1.6}, 1.5) == [1]
    assert slow_ranks({0: 1.0}, 1.5) == []
    assert slow_ranks({0: 0.0, 1: 0.0005}, 1.5) == []  # below a millisecond nobody is slow


def test_numbers():
    assert numbers([3]) == "rank 3"
    assert numbers([0, 1, 2, 7, 9, 10]) == "ranks 0-2, 7, 9-10"


def test_a_frame_of_ours_waits_for_nobody():
    assert not waits_for_others(sys._getframe())
    assert place(sys._getframe()).endswith("test_a_frame_of_ours_waits_for_nobody")
    assert not waits_for_others(None)


def frame(file: str, back: SimpleNamespace | None = None, **names: object) -> SimpleNamespace:
    """A frame of a function in `file`."""
    return SimpleNamespace(f_code=SimpleNamespace(co_filename=f"/somewhere/{file}"), f_globals=names, f_back=back)


def test_a_rank_waits_for_others_in_torchs_collectives():
    """Also when torch's wrappers are the innermost frames; code that a collective calls back works for itself."""
    collective = frame("torch/distributed/distributed_c10d.py")
    assert waits_for_others(collective)
    assert waits_for_others(frame("torch/_ops.py", frame("torch/utils/_contextlib.py", collective)))
    assert not waits_for_others(frame("torch/nn/functional.py", collective))
    assert not waits_for_others(frame("torch/_ops.py"))


def test_a_module_says_that_it_waits_for_others(monkeypatch):
    monkeypatch.setitem(globals(), "WAITS_FOR_OTHER_RANKS", True)
    assert waits_for_others(sys._getframe())
    for module in (collectives, metrics):
        assert module.WAITS_FOR_OTHER_RANKS


def test_on_a_gpu_the_flight_recorder_is_that_of_nccl(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", lambda: b"{}", raising=False)
    runtime = Runtime(rank=3, world_size=4, local_rank=3, device=torch.device("cuda", 3))
    Watchdog(WatchdogConfig(), runtime=runtime, run_dir=tmp_path)._dump(3)
    assert (tmp_path / "hang" / "rank_00003.flight.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("key", "value"), [("timeout_seconds", -1.0), ("slow_factor", 0.5), ("slow_factor", 1.0), ("report_seconds", 0.0)]
)
def test_refused(key, value):
    with pytest.raises(ValueError, match=f"watchdog.{key}="):
        WatchdogConfig(**{key: value}).validate()


@pytest.mark.parametrize(
    ("known", "reason"), [(True, "rank 1 is stuck"), (False, "rank 0 lost another rank in train_step")]
)
def test_a_verdict_is_not_written_over_by_a_rank_that_it_ended(tmp_path, known, reason):
    """Other ranks may see the connection break before their own watchdog ends them."""
    trainer = SimpleNamespace(  # what a report needs
        status=Status(tmp_path, main_process=True),
        position=Position(step=7, consumed_samples=56),
        watchdog=SimpleNamespace(has_reported=lambda: known, phase="train_step"),
        runtime=SimpleNamespace(rank=0, job=""),
        loader=SimpleNamespace(seen=lambda consumed: {}),
        tracker=SimpleNamespace(close=lambda state: None),
        store=SimpleNamespace(steps=lambda: [4], directory=tmp_path / "checkpoints"),
    )

    def ended_by_another() -> None:
        with reported(trainer):
            trainer.status.write("failed", 7, "rank 1 is stuck")
            raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    with pytest.raises(TrainingFailedError, match="rank 0"):
        ended_by_another()
    assert runs.status(tmp_path)["reason"].startswith(reason)


@pytest.mark.slow
def test_a_rank_that_sleeps_is_named(tiny_data, tmp_path):
    run = tmp_path / "asleep"
    job = local_run.start(
        tiny_data, run, "watchdog.timeout_seconds=20", "train.global_batch_size=6",
        RANKS_PER_NODE="3", HANG_STEP="7", SLOW_RANK="1", SHUTDOWN_TIMEOUT="5", TORCH_FR_BUFFER_SIZE="200",
    )  # fmt: skip
    assert local_run.finish(job) != 0
    status = runs.status(run)
    assert status["state"] == "failed"
    assert "rank 1 is stuck in step 7, train_step, at launch/slowed/sitecustomize.py" in status["reason"], status
    assert "ranks 0, 2 wait for others in step 7, train_step" in status["reason"], status
    assert status["reason"] in local_run.output(run)
    stacks = [(run / "hang" / f"rank_0000{rank}.txt").read_text() for rank in range(3)]
    assert "sitecustomize.py" in stacks[1]
    assert all("trainer.py" in text for text in stacks)
    assert json.loads((run / "hang" / "rank_00000.flight.json").read_text())


@pytest.mark.slow
def test_a_healthy_run_hears_nothing_and_a_rank_that_never_gets_to_the_loop_is_named(tiny_data, tmp_path):
    run, phase = tmp_path / "resumed", "restore step_00000004"
    healthy = ("train.stop_at=4", "watchdog.timeout_seconds=60", "watchdog.report_seconds=1")
    assert local_run.finish(local_run.start(tiny_data, run, *healthy, RANKS_PER_NODE="2")) == 0
    assert "watchdog" not in local_run.output(run)
    assert not (run / "hang").exists()
    job = local_run.start(
        tiny_data, run, "watchdog.timeout_seconds=15",
        RANKS_PER_NODE="2", HANG_IN="checkpoint.store:CheckpointStore.load", SLOW_RANK="1", SHUTDOWN_TIMEOUT="5",
    )  # fmt: skip
    assert local_run.finish(job) != 0
    reason = runs.status(run)["reason"]
    assert f"rank 1 is stuck in step 0, {phase}, at launch/slowed/sitecustomize.py" in reason, reason
    assert f"rank 0 waits for others in step 0, {phase}" in reason, reason


@pytest.mark.slow
def test_a_rank_that_does_not_end_is_ended(tiny_data, tmp_path):
    """All is done and saved: the run stays finished."""
    run = tmp_path / "endless"
    job = local_run.start(
        tiny_data, run, "watchdog.timeout_seconds=15",
        RANKS_PER_NODE="2", HANG_IN="runtime:stop", SLOW_RANK="1", SHUTDOWN_TIMEOUT="5",
    )  # fmt: skip
    local_run.finish(job)
    assert runs.status(run)["state"] == "finished"
    assert "rank 1 is stuck in step 20, end, at launch/slowed/sitecustomize.py" in local_run.output(run)


@pytest.mark.slow
def test_a_stopped_rank_is_named(tiny_data, tmp_path):
    """Rank 0 itself, whose thread cannot say anything either; rank 1 waits inside a layer's collective."""
    run = tmp_path / "stopped"
    job = local_run.start(
        tiny_data,
        run,
        "watchdog.timeout_seconds=20",
        "watchdog.report_seconds=3",  # and so a note of where it is every 1.5 s
        "parallel.tp=2",
        RANKS_PER_NODE="2",
        SLOW_STEP="1",
        STOP_STEP="5",
        SLOW_RANK="0",
        SHUTDOWN_TIMEOUT="5",
    )
    assert local_run.finish(job) != 0
    reason = runs.status(run)["reason"]
    # it stops in step 5; what it told the others last is a little older
    assert re.search(
        r"rank 0 does not answer \(last seen in step [345], \w+\); rank 1 waits for others in step 5", reason
    ), reason


@pytest.mark.slow
def test_a_slow_rank_is_reported(tiny_data, tmp_path):
    run = tmp_path / "slow"
    job = local_run.start(
        tiny_data, run, "watchdog.report_seconds=3", RANKS_PER_NODE="2", SLOW_STEP="0.6", SLOW_RANK="1"
    )
    assert local_run.finish(job) == 0
    assert "slow: rank 1 0." in local_run.output(run)
    assert "slow: rank 0" not in local_run.output(run)


@pytest.mark.slow
def test_a_killed_rank_leaves_a_message(tiny_data, tmp_path):
    run = tmp_path / "killed"
    job = local_run.start(tiny_data, run, RANKS_PER_NODE="2", SLOW_STEP="0.5")
    while job.poll() is None and len(runs.curve(run) if (run / "metrics.jsonl").exists() else []) < 3:
        time.sleep(0.2)
    for process in local_run.below(job.pid):
        if b"RANK=1" in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
            os.kill(process, signal.SIGKILL)
            break
    assert local_run.finish(job, 60) == 1
    reason = runs.status(run)["reason"]
    assert re.match(r"rank 0 lost another rank in \w+, see who ended first", reason), reason
    assert reason in local_run.output(run)
