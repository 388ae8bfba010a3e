"""`mlite train`: pretrain a model, or continue a run.

python -m megatron_lite train experiment=smoke
python -m megatron_lite train experiment=smoke train.max_steps=400 run.dir=runs/longer
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from megatron_lite.background import Lost, within
from megatron_lite.checkpoint.store import CheckpointStore
from megatron_lite.commands.command import run_command
from megatron_lite.file_lock import FileLock
from megatron_lite.output import output_in_background
from megatron_lite.runtime import (
    Runtime,
    keep_freed_memory,
    launched_ranks,
    set_deterministic,
    set_threads,
    start,
    stop,
)
from megatron_lite.tracking import write_loss_plot, write_report
from megatron_lite.training.build import build_schedule, build_trainer, check_batch_sizes, run_info
from megatron_lite.training.config import RunConfig, validate, validate_model
from megatron_lite.training.data import prepare_data
from megatron_lite.training.hints import how_to_lengthen
from megatron_lite.training.memory_check import MemoryCheck
from megatron_lite.training.resume import choose_checkpoint, choose_model
from megatron_lite.training.run_directory import keep_tokenizer, write_config
from megatron_lite.training.teacher import find_teacher
from megatron_lite.training.trainer import Trainer
from megatron_lite.training.watchdog import Watchdog

_DRAWING_SECONDS = 120.0


def main() -> None:
    """Parse, run, exit."""
    run_command(
        "train", RunConfig, "Pretrain a model; run it again with the same run.dir to continue where it stopped.", train
    )


def train(run: RunConfig) -> int:
    """One job of a run: build or resume, train, report. Returns the exit code."""
    if run.train.validate_only:
        return validate_only(run, world_size=launched_ranks())
    set_deterministic(run.train.deterministic)
    runtime = start(timeout_seconds=run.watchdog.group_seconds)
    lost = Lost()
    with ExitStack() as stack:
        stack.enter_context(output_in_background(lost))
        watchdog = stack.enter_context(Watchdog(run.watchdog, runtime=runtime, run_dir=Path(run.run.dir)))
        stack.callback(stop)
        stack.callback(watchdog.end)
        stack.push(watchdog.note_failure)
        validate(run, runtime.world_size)
        if _starts_afresh(run):
            build_schedule(run)  # refuses lengths that do not fit before anything is written
        set_threads(run.train.threads)
        if runtime.device.type == "cpu":
            keep_freed_memory()
        store = CheckpointStore.with_own_group(Path(run.run.dir) / "checkpoints", run.checkpoint)
        lock = FileLock(Path(run.run.dir) / "run.lock", key="run.dir", value=run.run.dir)
        store.ranks.first("lock run.dir", lambda: stack.enter_context(lock) and None)
        stack.enter_context(_named(run.run.dir))
        _train(run, runtime, store=store, watchdog=watchdog, lost=lost)
    return 0


def _train(run: RunConfig, runtime: Runtime, *, store: CheckpointStore, watchdog: Watchdog, lost: Lost) -> None:
    """The job, alone in its run directory."""
    watchdog.enter("check run.dir", 0)
    store.check_shared()
    point = choose_checkpoint(run, store)
    checkpoint = point.checkpoint if point else None
    run = choose_model(run, store, checkpoint)
    validate_model(run, runtime.world_size)
    find_teacher(run, store.ranks)
    watchdog.enter("prepare data", 0)
    prepare_data(run.data, vocab_size=run.model.vocab_size, report=print if runtime.is_main else None)
    watchdog.enter("build", 0)
    memory_check = MemoryCheck(run, runtime, lost)
    memory_check.warn()
    trainer = build_trainer(run, runtime, store=store, watchdog=watchdog, point=point, lost=lost)
    if trainer.is_finished:
        _close_finished(run, trainer, checkpoint)
        return
    _check_stop(run, trainer)
    if checkpoint and runtime.is_main:
        position = trainer.position
        print(f"resuming from {checkpoint}: step {position.step}, {position.consumed_samples} samples consumed")
    store.ranks.first("write run.dir", lambda: _describe(run))
    if checkpoint:
        store.abandon_after(trainer.position.step)
    trainer.tracker.start(run_info(run, trainer))
    outcome = trainer.fit()
    if runtime.is_main:
        if off := memory_check.conclude():
            print(off)
        _report(run, trainer, outcome)


def validate_only(run: RunConfig, *, world_size: int) -> int:
    """Check the config for `world_size` ranks without touching the run directory, and print their mesh; returns 0. Raises ValueError."""
    validate(run, world_size)
    if _starts_afresh(run):  # else batch sizes and length depend on where the run stands
        check_batch_sizes(run, build_schedule(run), world_size=world_size)
    print(f"the config is valid for {world_size} rank(s): {run.parallel.degrees(world_size)}")
    return 0


def _starts_afresh(run: RunConfig) -> bool:
    return run.resume in ("auto", "never") and not any(Path(run.run.dir).glob("checkpoints/step_*"))


@contextmanager
def _named(directory: str) -> Iterator[None]:
    """An OSError names a file, or at least the run directory: a write that fails does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or directory
        raise


def _close_finished(run: RunConfig, trainer: Trainer, checkpoint: Path | None) -> None:
    """What is left to do for a run whose last step is saved. Raises ValueError if that is another run, which `resume` names."""
    step = trainer.position.step
    if checkpoint and checkpoint.resolve().parent != trainer.store.directory.resolve():
        raise ValueError(
            f"resume={run.resume} is finished ({step} steps done), so there is nothing to train in run.dir={run.run.dir}; "
            "raise train.max_steps to continue from there"
        )
    trainer.declare_finished()
    if not trainer.runtime.is_main:
        return
    print(
        f"{run.run.dir} is finished: {step} steps done. Raise train.max_steps to continue it, or give run.dir=... for "
        "another run."
    )
    if not (Path(run.run.dir) / "report.html").exists():
        _report(run, trainer, "finished")


def _check_stop(run: RunConfig, trainer: Trainer) -> None:
    """Raises ValueError when `train.stop_at` names a step before the one that the run stands at."""
    step, stop = trainer.position.step, run.train.stop_at
    if stop is not None and stop < step:
        raise ValueError(
            f"train.stop_at={stop} is behind run.dir={run.run.dir}, which is at step {step}; raise it, drop it, or go back with "
            "resume=<a checkpoint of an earlier step>"
        )


def _describe(run: RunConfig) -> None:
    write_config(run)
    keep_tokenizer(run)


def _report(run: RunConfig, trainer: Trainer, outcome: str) -> None:
    directory = Path(run.run.dir)
    drawn = [
        f" {what}: {directory / name}."
        for what, name, draw in (("Losses", "loss.png", write_loss_plot), ("Report", "report.html", write_report))
        if within(_DRAWING_SECONDS, partial(draw, directory), name=name, on_loss=trainer.status.lost)
    ]
    print(f"{outcome} at step {trainer.position.step}.{''.join(drawn)}")
    if outcome == "stopped":
        print(f"Continue with the same command and a larger train.stop_at, or without it (run.dir={directory}).")
    elif outcome != "finished":
        print(f"Continue with the same command (run.dir={directory}).")
    else:
        print(
            "Try next:\n"
            f"  mlite evaluate checkpoint={directory}\n"
            f"  mlite generate checkpoint={directory} prompt='def main('\n"
            f"  mlite convert source={directory} target={directory}/hf to=hf\n"
            f"  {how_to_lengthen(trainer, directory)}"
        )
