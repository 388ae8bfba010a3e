"""A disk that is full or read-only: one clear line, whole checkpoints stay whole, and the same command goes on once there is room."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import megatron_lite.commands.train
from megatron_lite.checkpoint import Verifier
from megatron_lite.checkpoint.store import CheckpointStore
from tests import runs
from tests.bad_input.tour import snapshot


def mount(path: Path, options: str) -> bool:
    """Mount a small file system; False where we may not."""
    path.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    return os.geteuid() == 0 and subprocess.run(words, capture_output=True).returncode == 0


@pytest.fixture
def small(tour):
    """A file system of 1.25 MiB: room for two checkpoints of the tiny run and not for a third."""
    path = tour.home / "small"
    if not mount(path, "size=1280k"):
        pytest.skip("no file system can be mounted here")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(folder: Path, *, leave: int) -> Path:
    """A file that takes all the room but `leave` bytes."""
    ballast = folder / "ballast"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    ballast.write_bytes(b"x" * (free - leave))
    return ballast


def assert_whole(run_dir: Path, *names: str) -> None:
    checkpoints = sorted((run_dir / "checkpoints").glob("step_*"))
    assert [path.name for path in checkpoints] == list(names)
    assert [Verifier().look(path)[0] for path in checkpoints] == [None] * len(names)


def test_a_disk_that_fills_up_fails_the_run_and_keeps_its_checkpoints(tour, small, straight):
    run_dir = small / "r"
    ended = tour.call("train", *runs.arguments(tour.data, run_dir))
    assert ended.code == 1
    said = ended.err.splitlines()[-1]
    assert said.startswith(f"failed: step 12, run.dir={run_dir}: the checkpoint of step 12 was not saved"), ended.err
    assert "No space left on device; free some space" in said
    assert re.search(r"checkpoint\b.*\bstep 8\b", said)
    assert_whole(run_dir, "step_00000004", "step_00000008")
    assert [row["step"] for row in runs.rows(run_dir)] == list(range(1, 13))
    assert not list((run_dir / "checkpoints").glob(".tmp-*"))
    subprocess.run(["mount", "-o", "remount,size=20m", str(small)], check=True)
    assert tour.call("train", *runs.arguments(tour.data, run_dir)).code == 0
    assert runs.curve(run_dir) == runs.curve(straight)


def test_a_disk_too_full_for_a_row_fails_the_run(tour, small, straight):
    run_dir = small / "r"
    assert tour.call("train", *runs.arguments(tour.data, run_dir, "train.stop_at=4")).code == 0
    ballast = fill(small, leave=0)
    before = snapshot(run_dir / "checkpoints")
    ended = tour.call("train", *runs.arguments(tour.data, run_dir))
    assert ended.code in (1, 2), ended
    assert "No space left on device; free some space" in ended.err.splitlines()[-1], ended.err
    assert snapshot(run_dir / "checkpoints") == before
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small)], check=True)
    assert tour.call("train", *runs.arguments(tour.data, run_dir)).code == 0
    assert runs.curve(run_dir) == runs.curve(straight)


def test_a_full_disk_refuses_a_new_run_and_a_conversion(tour, small, straight):
    fill(small, leave=4096)
    for to in ("hf", "native"):
        tour.refused(
            "convert", f"source={straight}", f"target={small / 'x'}", f"to={to}", says=r"No space left on device"
        )
    ended = tour.call("train", *runs.arguments(tour.data, small / "r"))
    assert ended.code == 2, ended
    assert "No space left on device; free some space" in ended.err
    assert "r" in ended.err.split("No space")[0]


def test_a_read_only_disk_is_refused(tour, straight):
    disk = tour.home / "disk"
    if not mount(disk, "size=20m"):
        pytest.skip("no file system can be mounted here")
    try:
        run_dir = Path(shutil.copytree(straight, disk / "r"))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for directory in (run_dir, disk / "new"):
            typed = runs.arguments(tour.data, directory, "train.max_steps=30")
            tour.refused(
                "train", *typed, says=rf"{directory.name}.*: Read-only file system; name a directory on a disk that can"
            )
        tour.refused("convert", f"source={run_dir}", f"target={disk / 'x'}", says=r"x.*: Read-only file system")
        assert tour.call("generate", f"checkpoint={run_dir}", "prompt=the", "max_new_tokens=4").code == 0
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("behind", [False, True], ids=["foreground", "background"])
def test_a_writer_that_finds_no_room_needs_no_mounted_disk(tour, straight, behind):
    """The same with a stream that has no room from the third checkpoint on, also where a background save finds it."""

    class FullFile:
        def __init__(self, path: Path) -> None:
            self.raw = open(path, "wb")  # noqa: SIM115

        def write(self, data: bytes) -> int:
            if any(part.endswith("step_00000012") for part in Path(self.raw.name).parts):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.raw.write(data)

        def __getattr__(self, name: str):
            return getattr(self.raw, name)

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            self.raw.close()

    class FullStore(CheckpointStore):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options, open_stream=FullFile)  # type: ignore[arg-type]

    run_dir = tour.home / "r"
    with tour.monkeypatch.context() as patch:
        patch.setattr(megatron_lite.commands.train, "CheckpointStore", FullStore)
        ended = tour.call("train", *runs.arguments(tour.data, run_dir, f"checkpoint.async_save={behind}"))
    assert ended.code == 1, ended
    assert "the checkpoint of step 12 was not saved" in ended.err
    assert "No space left on device; free some space" in ended.err
    assert_whole(run_dir, "step_00000004", "step_00000008")
    assert runs.status(run_dir)["state"] == "failed"
    assert tour.call("train", *runs.arguments(tour.data, run_dir)).code == 0
    assert runs.curve(run_dir) == runs.curve(straight)
    assert runs.digest(run_dir / "checkpoints" / "step_00000020") == runs.digest(
        straight / "checkpoints" / "step_00000020"
    )
