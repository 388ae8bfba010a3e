"""Executors: what the command does when tasks run elsewhere, refuse their input, or vanish."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from data_tools.execution import is_done, run_step
from data_tools.recipe import ExecutorConfig
from data_tools.steps import Progress, Step, fingerprint
from megatron_lite.atomic import explain_os_error
from tests.data_tools.texts import WORDS


@dataclass
class WriteStep(Step):
    """Three tasks; `settings` is the rank that refuses, or None."""

    def tasks(self) -> int:
        return 3

    def run_task(self, rank: int, progress: Progress) -> None:
        if rank == self.settings:
            raise ValueError(f"file.jsonl:7 is bad (task {rank})")
        with (self.folder / f"{rank}.txt").open("a") as file:
            file.write(WORDS[rank])


def run(step: Step, executor: ExecutorConfig) -> None:
    run_step(step, executor, Console(file=io.StringIO()))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_refusal_is_told_as_it_was_said_and_finished_tasks_stay(tmp_path, workers: int) -> None:
    executor = ExecutorConfig(workers=workers)
    with pytest.raises(ValueError, match=r"^file.jsonl:7 is bad \(task 2\)$"):
        run(WriteStep("write", tmp_path / "s", 2), executor)
    step = WriteStep("write", tmp_path / "s", None)
    assert not is_done(step)
    run(step, executor)
    assert is_done(step)
    assert [(tmp_path / "s" / f"{i}.txt").read_text() for i in range(3)] == WORDS[:3]  # none was run twice
    assert run_step(step, executor, Console(file=io.StringIO())) == 0.0


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_between_the_last_task_and_the_end_of_the_step(tmp_path, workers: int) -> None:
    step = WriteStep("write", tmp_path / "s", None)
    run(step, ExecutorConfig(workers=workers))
    (tmp_path / "s" / "DONE.json").unlink()  # every task is marked, the step is not
    run(step, ExecutorConfig(workers=workers))
    assert is_done(step)
    assert [(tmp_path / "s" / f"{i}.txt").read_text() for i in range(3)] == WORDS[:3]


@dataclass
class FullDisk(WriteStep):
    """A disk on which not even the refusal can be written, nor datatrove's own log."""

    def run_task(self, rank: int, progress: Progress) -> None:
        (self.folder / "refused").write_text("a file where the folder of refusals should be")
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_without_room_for_the_refusal_itself(tmp_path, monkeypatch, workers: int) -> None:
    def full(self, rank: int, local_rank: int = 0) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match=r"cannot write, No space left on device; nothing half-written"):
        run(FullDisk("write", tmp_path / "s", None), ExecutorConfig(workers=workers))
    monkeypatch.setattr(
        "data_tools.execution.LocalExecutor._run_for_rank", full
    )  # datatrove's log, before and after a task
    with pytest.raises(ValueError, match=r"cannot write, No space left on device; nothing half-written"):
        run(WriteStep("write", tmp_path / "t", None), ExecutorConfig(workers=1))


def test_a_short_write_of_numpy_is_a_full_disk(tmp_path) -> None:
    told = explain_os_error(OSError("4096 requested and 0 written"), tmp_path / "a.npy")
    assert "cannot write, No space left on device" in str(told)


def test_an_unknown_executor(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"executor.kind=pigeon is unknown; one of local, slurm, ray"):
        run(WriteStep("write", tmp_path / "s", None), ExecutorConfig(kind="pigeon"))


SBATCH = """#!{python}
# A Slurm of one machine: runs every task of the array at once and says that it was submitted.
import os, re, subprocess, sys
script = sys.argv[-1]
last = int(re.search(r"--array=0-(\\d+)", open(script).read()).group(1)) if "merge_stats" not in open(script).read() else -1
for task in range(last + 1):
    environment = dict(os.environ, SLURM_ARRAY_TASK_ID=str(task), RUN_OFFSET="0", SLURM_NODELIST="here")
    if not os.environ.get("LOSE_TASKS"):
        subprocess.run(["bash", script], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 17")
"""
SRUN = '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done\nexec "$@"\n'


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """Stand-ins for Slurm's commands, first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    commands = {"sbatch": SBATCH.format(python=sys.executable), "srun": SRUN}
    commands |= {"squeue": "#!/bin/bash\n", "scontrol": "#!/bin/bash\necho here\n"}
    for name, text in commands.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    return folder


def test_slurm_runs_the_same_tasks(make_recipe, slurm, tmp_path) -> None:
    from data_tools.prepare import PrepareConfig, prepare

    executor = ExecutorConfig(kind="slurm", poll_seconds=0.1, arguments={"partition": "cpu"})
    recipe = make_recipe(output=str(tmp_path / "slurm"))
    recipe.read.shard_bytes = 1_000_000
    prepare(PrepareConfig(recipe, executor, stages=["read"]), Console(file=io.StringIO()))
    recipe = make_recipe(output=str(tmp_path / "local"))
    recipe.read.shard_bytes = 1_000_000
    prepare(PrepareConfig(recipe, stages=["read"]), Console(file=io.StringIO()))
    shards = {place: sorted((tmp_path / place).rglob("*.zst")) for place in ("slurm", "local")}
    assert [path.name for path in shards["slurm"]] == [path.name for path in shards["local"]]
    assert len(shards["slurm"]) == 2
    for a, b in zip(shards["slurm"], shards["local"]):
        assert a.read_bytes() == b.read_bytes()


def test_a_job_that_vanishes_is_told(slurm, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LOSE_TASKS", "1")
    executor = ExecutorConfig(kind="slurm", poll_seconds=0.01, arguments={"partition": "cpu"})
    with pytest.raises(RuntimeError, match="Slurm job 17 ended with unfinished tasks"):
        run(WriteStep("write", tmp_path / "s", None), executor)


def test_a_fingerprint_covers_settings_and_parents() -> None:
    assert fingerprint({"a": 1}, "x") == fingerprint({"a": 1}, "x")
    assert (
        len({fingerprint({"a": 1}, "x"), fingerprint({"a": 2}, "x"), fingerprint({"a": 1}, "y"), fingerprint({"a": 1})})
        == 4
    )
