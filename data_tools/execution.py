"""Steps on datatrove's executors: this machine, Slurm or Ray, with the same tasks, the same marks and the same bytes.

Notable features:
- datatrove marks every finished task by a file; after a kill, the same command continues with the remaining tasks
- local workers are forked from a clean server process and end with the command, however it ends
- progress is read from small files of the tasks, which also works on the shared disk of a cluster
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import multiprocess
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import setup_default_logger
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from data_tools.recipe import ExecutorConfig
from data_tools.steps import Progress, Step
from megatron_lite.atomic import explain_os_error, write_json, write_text
from megatron_lite.errors import WorkFailedError

DONE = "DONE.json"


class RunStep(PipelineStep):
    """One of our steps as a datatrove pipeline of one block. A task's error message is written to a file that the command reads."""

    type = "megatron_lite"

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.name = step.name
        self.step = step

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Run task `rank`."""
        folder = self.step.folder
        try:
            with self.track_time():
                progress = Progress(folder / "progress" / f"{rank:05d}")
                self.step.run_task(rank, progress)
        except (ValueError, OSError) as error:
            told = explain_os_error(error, folder) if isinstance(error, OSError) else error
            with contextlib.suppress(OSError, ValueError):
                write_text(folder / "refused" / f"{rank:05d}.txt", f"{told}")
            raise told from error
        return iter(())


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's local executor, logging to a file, with workers that do not outlive a killed command."""

    def run(self) -> None:
        """Run the tasks that are not marked as finished."""
        log = Path(self.logging_dir.resolve_paths("console.log"))
        log.parent.mkdir(parents=True, exist_ok=True)
        ranks = self.get_incomplete_ranks(range(self.tasks))
        if self.workers == 1 or not ranks:
            with log.open("a") as file, contextlib.redirect_stderr(file):
                for rank in ranks:
                    self._run_for_rank(rank)
            setup_default_logger()  # datatrove's logger holds the file as its standard error
            return
        context = multiprocess.get_context("forkserver")
        context.set_forkserver_preload(["data_tools.pipeline"])
        # A single task also runs in its own process: the memory that training a tokenizer took is freed with it.
        workers = min(self.workers, len(ranks))
        with context.Pool(workers, _start_worker, (str(log), os.getpid(), workers)) as pool:
            for _ in pool.imap_unordered(self._run_for_rank, ranks):
                pass


def _start_worker(log: str, command: int, workers: int) -> None:
    # A tokenizer starts one thread per core; several workers would compete for the same cores.
    os.environ["RAYON_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    # the task reports a full disk; the pool would restart a worker that fails here forever
    with contextlib.suppress(OSError):
        sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115  (for the life of the process)

    def watch() -> None:
        while True:
            time.sleep(0.5)
            try:
                os.kill(command, 0)
            except OSError:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_step(step: Step, executor: ExecutorConfig, console: Console) -> float:
    """Run what is left of `step` and return the seconds it took; 0 when it was finished before.

    Raises:
        ValueError: a task rejected its input (with its own message), or did not finish.
    """
    if (step.folder / DONE).exists():
        return 0.0
    step.folder.mkdir(parents=True, exist_ok=True)
    # of a run that was stopped or killed
    for stale in [*step.folder.glob("refused/*.txt"), *step.folder.rglob(".*.tmp-*")]:
        stale.unlink(missing_ok=True)
    tasks = step.tasks()
    start = time.monotonic()
    if tasks:
        engine = make_executor(step, tasks, executor)
        with _shown(step, tasks, console):
            try:
                engine.run()
                if executor.kind == "slurm":
                    _wait(step, engine, executor)
                if engine.get_incomplete_ranks(range(tasks)):  # Ray continues when a task fails
                    raise ValueError(
                        _refusals(step) or f"{step.name}: tasks are unfinished; logs: {step.folder / 'logs'}"
                    )
            except Exception as error:
                if refusals := _refusals(step):
                    raise ValueError(refusals) from None
                if isinstance(error, OSError):  # of the executor's own marks and logs
                    raise explain_os_error(error, step.folder) from error
                if isinstance(error, ValueError):
                    raise
                raise WorkFailedError(
                    f"{step.name}: a task failed ({error}); its log is in {step.folder / 'logs'}"
                ) from error
    step.finish()
    seconds = time.monotonic() - start
    write_json(step.folder / DONE, {"tasks": tasks, "seconds": round(seconds, 3)})
    return seconds


def make_executor(step: Step, tasks: int, executor: ExecutorConfig) -> Any:
    """The datatrove executor for `step`.

    Raises:
        ValueError: an unknown kind.
    """
    logs = str(step.folder.resolve() / "logs")
    block = RunStep(step)
    if executor.kind == "local":
        return LocalExecutor([block], tasks=tasks, workers=executor.workers, logging_dir=logs)
    if executor.kind == "slurm":
        arguments = {
            "time": "24:00:00",
            "env_command": f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={os.pathsep.join(p for p in sys.path if p)}",
            "qos": "",
            **executor.arguments,
        }
        return SlurmPipelineExecutor(
            [block], tasks=tasks, workers=executor.workers, logging_dir=logs, job_name=step.name, **arguments
        )
    if executor.kind == "ray":
        from datatrove.executor import RayPipelineExecutor

        return RayPipelineExecutor(
            [block], tasks=tasks, workers=executor.workers, logging_dir=logs, **executor.arguments
        )
    raise ValueError(f"executor.kind={executor.kind} is unknown; one of local, slurm, ray")


def _refusals(step: Step) -> str:
    return "\n".join(sorted({path.read_text() for path in step.folder.glob("refused/*.txt")}))


def _wait(step: Step, engine: Any, executor: ExecutorConfig) -> None:
    """Wait until every task of a Slurm job is marked as finished. Ends early if a task failed or the job disappeared."""
    gone = 0
    while engine.get_incomplete_ranks(skip_completed=True):
        if refusals := _refusals(step):
            raise ValueError(refusals)
        gone = gone + 1 if not _queued(engine.job_id) else 0
        if gone > 2:
            raise WorkFailedError(
                f"{step.name}: Slurm job {engine.job_id} ended with unfinished tasks; its output is in {engine.slurm_logs_folder}. The "
                "same command continues with the unfinished tasks"
            )
        time.sleep(executor.poll_seconds)


def _queued(job: str) -> bool:
    import subprocess

    found = subprocess.run(["squeue", "-h", "-j", str(job)], capture_output=True, text=True)
    return bool(found.stdout.strip())


@contextlib.contextmanager
def _shown(step: Step, tasks: int, console: Console) -> Iterator[None]:
    """A progress bar until the block ends; nothing where there is no terminal."""
    if not console.is_terminal:
        yield
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    stop = threading.Event()
    with Bar(*columns, console=console, transient=True) as bar:
        line = bar.add_task(f"{step.name:20}", total=tasks, note="")

        def watch() -> None:
            start = time.monotonic()
            while not stop.wait(0.5):
                done = len(list((step.folder / "logs" / "completions").glob("*")))
                size = sum(_number(path) for path in (step.folder / "progress").glob("*")) / 1e6
                rate = size / (time.monotonic() - start)
                bar.update(line, completed=done, note=f"{done}/{tasks} tasks  {size:,.0f} MB  {rate:.1f} MB/s")

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _number(path: Path) -> int:
    try:
        return int(path.read_text() or 0)
    except (OSError, ValueError):
        return 0


def is_done(step: Step) -> bool:
    """Whether every task of `step` is finished."""
    return (step.folder / DONE).exists()
