"""What only watches a training neither ends nor changes it, whether it raises or hangs; what was lost is said and kept."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from megatron_lite.background import Background, Lost
from megatron_lite.commands import train
from megatron_lite.runtime import Runtime
from megatron_lite.tracking import base
from megatron_lite.tracking.console import ConsoleTracker
from megatron_lite.training import status, watchdog
from megatron_lite.training.status import Status
from megatron_lite.training.watchdog import Watchdog, WatchdogConfig
from tests import runs
from tests.distributed import PATIENCE_SECONDS


def raises(*_: object, **__: object) -> None:
    raise RuntimeError("planted")


def hangs(*_: object, **__: object) -> None:
    threading.Event().wait()


@pytest.mark.parametrize("fault", [raises, hangs])
def test_a_training_goes_on_without_any_of_them(fault, tiny_data, straight, tmp_path, monkeypatch, recwarn):
    for method in ("start", "log", "close"):
        monkeypatch.setattr(ConsoleTracker, method, fault)
    monkeypatch.setattr(Status, "_write", fault)
    for name in runs.DRAWINGS:
        monkeypatch.setattr(train, name, fault)
    for module in (base, status):
        monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(train, "_DRAWING_SECONDS", 0.2)
    assert runs.run(tiny_data, tmp_path / "r", "tracking.console=true", drawn=True) == 0
    assert runs.curve(tmp_path / "r") == runs.curve(straight)
    said = [
        str(warning.message).split(" is left out")[0] for warning in recwarn if "is left out" in str(warning.message)
    ]
    assert sorted(said) == ["ConsoleTracker", "loss.png", "report.html", "status.json"]


def test_a_loss_is_said_once():
    """Though its queue is full, and then it is waited for in vain."""
    said: list[str] = []
    gate = threading.Event()
    background = Background("it", on_loss=said.append, backlog=1)
    for _ in range(3):
        background.call(gate.wait)
    assert not background.finish(time.monotonic())
    gate.set()
    assert len(said) == 1


def test_what_was_lost_stands_in_the_status(tmp_path):
    lost = Lost()
    written = Status(tmp_path, main_process=True, lost=lost)
    written.write("finished", 7, "all steps done")
    with pytest.warns(UserWarning, match="standard output"):
        lost("standard output is left out: BrokenPipeError")
    written.finish()
    assert runs.status(tmp_path)["state"] == "finished"
    assert runs.status(tmp_path)["lost"] == ["standard output is left out: BrokenPipeError"]


@pytest.mark.slow
def test_closed_streams_leave_the_training_alone(tiny_data, straight, tmp_path):
    """`mlite train 2>&1 | head -1`."""
    words = [
        sys.executable,
        "-m",
        "megatron_lite",
        "train",
        *runs.arguments(tiny_data, tmp_path / "r", "tracking.console=true"),
    ]
    job = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert job.stdout is not None
    job.stdout.readline()
    job.stdout.close()
    assert job.wait(timeout=PATIENCE_SECONDS) == 0
    assert runs.curve(tmp_path / "r") == runs.curve(straight)
    assert any("BrokenPipe" in reason for reason in runs.status(tmp_path / "r")["lost"])


@pytest.mark.parametrize("fault", [raises, hangs])
def test_a_hang_ends_the_job_though_its_stacks_cannot_be_written(fault, tmp_path, monkeypatch, capsys):
    class Ended(BaseException):
        """Instead of the end of this process."""

    def end(code: int) -> None:
        raise Ended(code)

    notes = SimpleNamespace(
        publish=lambda *_: None,
        first_to_arrive=lambda _: True,
        read=lambda kind: (
            {0: {"step": 3, "phase": "train_step", "waits": False, "at": "here"}} if kind == "hang" else {}
        ),
        report=lambda: None,
    )
    dog = Watchdog(WatchdogConfig(), runtime=Runtime(0, 1, 0, torch.device("cpu")), run_dir=tmp_path)
    dog.enter("train_step", 3)
    monkeypatch.setattr(dog, "_dump", fault)
    monkeypatch.setattr(watchdog, "_DUMP_SECONDS", 0.2)
    monkeypatch.setattr(watchdog, "_say", partial(print, file=sys.stderr))
    monkeypatch.setattr(watchdog.os, "_exit", end)
    with pytest.raises(Ended, match="3"):
        dog._end_the_job(notes, 99.0)
    assert "rank 0 is stuck in step 3, train_step" in runs.status(tmp_path)["reason"]
    assert "dump of the stacks is left out" in capsys.readouterr().err
