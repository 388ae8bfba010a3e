import errno
import fcntl
import json
import logging
import os

import pytest

from megatron_lite.file_lock import FileLock
from tests.checkpoint.processes import start_alone


def lock_of(folder, **more):
    return FileLock(folder / "run.lock", key="run.dir", value=folder, **more)


def take(run_dir):
    with lock_of(run_dir):
        never_comes = os.open(run_dir / "fifo", os.O_RDONLY)
        os.read(never_comes, 1)


def test_a_second_process_is_refused_until_the_first_dies(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    process = start_alone(take, tmp_path)
    writer = os.open(tmp_path / "fifo", os.O_WRONLY)  # returns when the other side has opened it
    with pytest.raises(ValueError, match=f"run.dir=.* is in use by process {process.pid} on host"):
        lock_of(tmp_path).acquire()
    process.kill()
    process.join()
    os.close(writer)
    with lock_of(tmp_path) as lock:
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()


def test_released_and_taken_again(tmp_path):
    with lock_of(tmp_path / "new"), pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        lock_of(tmp_path / "new").acquire()
    with lock_of(tmp_path / "new"):
        pass


def test_a_forked_worker_does_not_keep_it(tmp_path):
    lock = lock_of(tmp_path).acquire()
    stay, go = os.pipe()
    ready, set_ready = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        os.write(set_ready, b"x")
        os.read(stay, 1)
        os._exit(0)
    os.read(ready, 1)
    lock.release()
    with lock_of(tmp_path):
        pass
    os.close(go)
    os.waitpid(child, 0)


def test_the_parent_keeps_it_when_a_worker_ends(tmp_path):
    with lock_of(tmp_path):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(ValueError, match="in use"):
            lock_of(tmp_path).acquire()


def test_a_garbled_owner(tmp_path):
    with lock_of(tmp_path) as lock:
        lock.path.write_text("{")
        with pytest.raises(ValueError, match="in use by another process"):
            lock_of(tmp_path).acquire()


def test_a_file_system_without_locks_warns(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING), lock_of(tmp_path):
        assert "has no locks" in caplog.text


def test_who_waits_is_told_for_whom_and_goes_on_when_it_ends(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    process = start_alone(take, tmp_path)
    writer = os.open(tmp_path / "fifo", os.O_WRONLY)
    told = []

    def waiting(owner):
        told.append(owner)
        process.kill()

    with lock_of(tmp_path, waiting=waiting):
        assert f"process {process.pid} on host" in told[0]
    os.close(writer)
    process.join()
