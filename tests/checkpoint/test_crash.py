"""Kill -9 at every system call that matters, and at random moments: what is visible afterwards is whole."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from megatron_lite.checkpoint import CheckpointConfig, CheckpointStore
from tests.checkpoint.processes import STATE, bitwise_equal, empty_like, run_alone, start_alone, tensors_of


def newest(folder: Path) -> int:
    """Load the newest valid checkpoint, as the next process would; its step, having compared every number."""
    store = CheckpointStore(folder, CheckpointConfig(keep=2))
    path = store.newest_valid()
    if path is None:
        return 0
    step = store.read_manifest(path)["step"]
    target = empty_like(tensors_of(step))
    store.load(path, target)
    assert bitwise_equal(target, tensors_of(step))
    return step


def save_and_die_at(folder: Path, step: int, fatal: int) -> None:
    """Die before the `fatal`-th of the calls that change the disk."""
    calls = 0

    def counted(call):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fatal:
                os._exit(9)
            return call(*args, **kwargs)

        return wrapper

    for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))

    def open_stream(path):
        return counted(open)(path, "wb")

    CheckpointStore(folder, CheckpointConfig(keep=2), open_stream=open_stream).save(step, tensors_of(step), STATE)
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
def test_death_before_every_change_of_the_disk(tmp_path, again):
    step = 2 if again else 3
    store = CheckpointStore(tmp_path / "before", CheckpointConfig(keep=2))
    for old in (1, 2):
        store.save(old, tensors_of(old), STATE)
    fatal, survived = 1, False
    while not survived:
        folder = tmp_path / str(fatal)
        shutil.copytree(store.directory, folder)
        survived = run_alone(save_and_die_at, folder, step, fatal) == 0
        assert newest(folder) in ((2,) if again else (2, 3))
        CheckpointStore(folder, CheckpointConfig(keep=2)).save(4, tensors_of(4), STATE)  # clears what was left
        assert newest(folder) == 4
        assert not list(folder.glob(".*"))
        shutil.rmtree(folder)
        fatal += 1
    assert fatal > 12  # else nothing was counted


def save_for_ever(folder: Path, behind: bool) -> None:
    store = CheckpointStore(folder, CheckpointConfig(keep=2, async_save=behind))
    step = newest(folder)
    while True:
        step += 1
        store.save(step, tensors_of(step), STATE)
        (folder.parent / "began").write_text(str(step))


@pytest.mark.parametrize(
    "behind",
    [pytest.param(False, id="foreground", marks=pytest.mark.slow), pytest.param(True, id="background")],
)
def test_death_at_random_moments(tmp_path, behind):
    draw = random.Random(7)
    folder = tmp_path / "checkpoints"
    before = 0
    for _ in range(8):
        (tmp_path / "began").unlink(missing_ok=True)
        process = start_alone(save_for_ever, folder, behind)
        while not (tmp_path / "began").exists():
            time.sleep(0.001)
            assert process.is_alive()
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.join()
        reached = int((tmp_path / "began").read_text() or 0)
        after = newest(folder)
        # in the foreground what `save` returned from is there; behind, all but the one in flight
        assert after >= max(before, reached - behind)
        before = after
