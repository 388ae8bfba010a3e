"""Hangs name their culprit, slow ranks are reported; a run without either is left alone."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_lite.errors import TrainingFailedError
from megatron_lite.runtime import Runtime, start
from megatron_lite.training import watchdog
from megatron_lite.training.rank_notes import Others
from megatron_lite.training.reporting import reported
from megatron_lite.training.status import Status
from megatron_lite.training.trainer import Position
from megatron_lite.training.watchdog import Watchdog, WatchdogConfig
from tests import runs
from tests.forked import PROCESSES
from tests.launch import forked_run, local_run
from tests.launch.slurm_cluster import free_ports


def test_on_a_gpu_the_flight_recorder_is_that_of_nccl(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", lambda: b"{}", raising=False)
    runtime = Runtime(rank=3, world_size=4, local_rank=3, device=torch.device("cuda", 3))
    Watchdog(WatchdogConfig(), runtime=runtime, run_dir=tmp_path)._dump(3)
    assert (tmp_path / "hang" / "rank_00003.flight.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("timeout_seconds", -1.0),
        ("slow_factor", 0.5),
        ("slow_factor", 1.0),
        ("report_seconds", 0.0),
        ("lost_seconds", 5.0),
    ],
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
        watchdog=SimpleNamespace(
            has_reported=lambda: known, phase="train_step", failed_first=lambda: None, fail=lambda text: None
        ),
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


class Notes:
    """Those of a next rank whose heartbeat never changes."""

    rank, ranks = 3, 4

    def __init__(self, phase: str = "data") -> None:
        self.beat, self.told = {"step": 4, "phase": phase, "number": 9}, None

    def read_one(self, kind, rank):
        return self.beat

    def failure(self):
        return self.told

    def fail(self, note):
        self.told = note


def first_alarm(notes: Notes, moments: list[float]) -> float | None:
    others = Others(notes, lost_seconds=40)
    return next((now for now in moments if others.have_failed(now, patience=10)), None)


def test_a_heartbeat_that_stops_is_told_and_then_followed():
    notes = Notes()
    assert (
        first_alarm(notes, [1000.0 + 5 * i for i in range(20)]) == 1060.0
    )  # 40 s of silence, 10 s to leave, and two looks
    assert notes.told["rank"] == 0
    assert first_alarm(Notes("gone"), [1000.0 + 5 * i for i in range(20)]) is None


def test_a_job_that_was_suspended_accuses_nobody():
    notes = Notes()
    assert first_alarm(notes, [1000.0, 1005.0, 3000.0, 3005.0, 3030.0]) is None
    assert notes.told is None


def rank_that_is_left(environment: dict[str, str], run_dir: Path, end: str) -> None:
    """One of two ranks: rank 1 ends as `end` says, rank 0 sits in the phase train_step, as on a GPU, where nothing raises."""
    os.environ |= environment
    watchdog._SECONDS_TO_FOLLOW = 1.0
    here = start()
    config = WatchdogConfig(timeout_seconds=300, report_seconds=1, lost_seconds=3)
    with Watchdog(config, runtime=here, run_dir=run_dir) as dog:
        dog.enter("train_step", 7)
        time.sleep(1.0)
        if here.rank == 1 and end == "killed":
            os._exit(9)
        elif here.rank == 1:
            dog.fail("ValueError: a bad sample")
        time.sleep(100)  # an exit that waits for the others


@pytest.mark.parametrize(("end", "says"), [("failed", "ValueError: a bad sample"), ("killed", "no heartbeat for 3 s")])
def test_a_rank_that_is_lost_ends_the_others_with_its_name(tmp_path, end, says):
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    environments = [shared | {"RANK": str(rank)} for rank in range(2)]
    ranks = [PROCESSES.Process(target=rank_that_is_left, args=(each, tmp_path, end)) for each in environments]
    for process in ranks:
        process.start()
    ranks[0].join(60)
    for process in ranks:
        process.kill()
        process.join()
    assert ranks[0].exitcode == watchdog.EXIT_CODE
    status = runs.status(tmp_path)
    assert status["state"] == "failed"
    assert status["reason"].startswith("rank 1 failed in step 7, train_step: ")
    assert says in status["reason"]


@pytest.mark.slow
def test_a_rank_that_sleeps_is_named(tiny_data, tmp_path):
    run = tmp_path / "asleep"
    codes = forked_run.train(
        tiny_data, run, "watchdog.timeout_seconds=15", "train.global_batch_size=6",
        ranks=3, HANG_STEP="7", SLOW_RANK="1", TORCH_FR_BUFFER_SIZE="200",
    )  # fmt: skip
    assert all(codes)
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
    assert forked_run.train(tiny_data, run, *healthy) == [0, 0]
    assert "watchdog" not in local_run.output(run)
    assert not (run / "hang").exists()
    hangs = {"HANG_IN": "checkpoint.store:CheckpointStore.load", "SLOW_RANK": "1"}
    assert all(forked_run.train(tiny_data, run, "watchdog.timeout_seconds=15", **hangs))
    reason = runs.status(run)["reason"]
    assert f"rank 1 is stuck in step 0, {phase}, at launch/slowed/sitecustomize.py" in reason, reason
    assert f"rank 0 waits for others in step 0, {phase}" in reason, reason


@pytest.mark.slow
def test_a_rank_that_does_not_end_is_ended(tiny_data, tmp_path):
    """All is done and saved: the run stays finished."""
    run = tmp_path / "endless"
    job = local_run.start(  # under torchrun, whose store outlives rank 0
        tiny_data, run, "watchdog.timeout_seconds=30",
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
    assert forked_run.train(tiny_data, run, "watchdog.report_seconds=3", SLOW_STEP="0.6", SLOW_RANK="1") == [0, 0]
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
    assert re.match(r"rank 0 lost another rank in \w+, see who ended first", reason), local_run.output(run)
    assert reason in local_run.output(run)
