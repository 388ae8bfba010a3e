"""`mlite train`: pretrain a model, or go on with a run.

python -m megatron_lite train experiment=smoke
python -m megatron_lite train experiment=smoke train.max_steps=400 run.dir=runs/longer
"""

from __future__ import annotations

from pathlib import Path

from megatron_lite.checkpoint.store import CheckpointStore
from megatron_lite.commands.command import run_command
from megatron_lite.errors import error_text
from megatron_lite.file_lock import FileLock
from megatron_lite.runtime import Runtime, set_deterministic, set_threads, start, stop
from megatron_lite.tracking import write_loss_plot, write_report
from megatron_lite.training.build import build_schedule, build_trainer, prepare_data, run_info
from megatron_lite.training.config import RunConfig, validate, validate_model
from megatron_lite.training.resume import choose_checkpoint, choose_model
from megatron_lite.training.run_directory import keep_tokenizer, write_config
from megatron_lite.training.trainer import Trainer
from megatron_lite.training.watchdog import Watchdog


def main() -> None:
    """Parse, run, exit."""
    run_command(
        "train", RunConfig, "Pretrain a model; run it again with the same run.dir to go on where it stopped.", train
    )


def train(run: RunConfig) -> int:
    """One job of a run: build or resume, train, report. Returns the exit code."""
    runtime = start(timeout_seconds=run.watchdog.group_seconds)
    with Watchdog(run.watchdog, runtime=runtime, run_dir=Path(run.run.dir)) as watchdog:
        try:
            return _checked(run, runtime, watchdog)
        finally:
            watchdog.end()
            stop()


def _checked(run: RunConfig, runtime: Runtime, watchdog: Watchdog) -> int:
    validate(run, runtime.world_size)
    build_schedule(run)  # lengths that do not fit are refused before anything is written
    set_threads(run.train.threads)
    set_deterministic(run.train.deterministic)
    store = CheckpointStore.with_own_group(Path(run.run.dir) / "checkpoints", run.checkpoint)
    lock = FileLock(Path(run.run.dir) / "run.lock", key="run.dir", value=run.run.dir)
    store.ranks.first("lock run.dir", lambda: _acquire(lock))
    try:
        watchdog.enter("check run.dir", 0)
        store.check_shared()
        return _locked(run, runtime, store, watchdog)
    except OSError as error:
        error.filename = error.filename or run.run.dir  # a write that fails does not say where
        raise
    finally:
        lock.release()


def _locked(run: RunConfig, runtime: Runtime, store: CheckpointStore, watchdog: Watchdog) -> int:
    say = print if runtime.is_main else _silent
    checkpoint = choose_checkpoint(run, store)
    run = choose_model(run, store, checkpoint)
    validate_model(run)
    watchdog.enter("prepare data", 0)
    prepare_data(run.data, vocab_size=run.model.vocab_size, report=say)
    watchdog.enter("build", 0)
    trainer = build_trainer(run, runtime, store=store, watchdog=watchdog, checkpoint=checkpoint)
    position = trainer.position
    if position.consumed_samples >= trainer.schedule.total_samples:
        if checkpoint and checkpoint.resolve().parent != store.directory.resolve():
            raise ValueError(
                f"resume={run.resume} is finished ({position.step} steps done), so nothing would come to lie in run.dir="
                f"{run.run.dir}; raise train.max_steps to go on from there"
            )
        say(
            f"{run.run.dir} is finished: {position.step} steps done. Raise train.max_steps to go on, or give run.dir=... "
            "for another run."
        )
        trainer.declare_finished()  # a kill may have come between the last save and this
        if runtime.is_main and not (Path(run.run.dir) / "report.html").exists():
            _report(run, trainer, "finished")
        return 0
    if checkpoint:
        say(f"resuming from {checkpoint}: step {position.step}, {position.consumed_samples} samples consumed")
    store.ranks.first("write run.dir", lambda: _describe(run))
    if checkpoint:
        store.abandon_after(position.step)
    trainer.tracker.start(run_info(run, trainer))
    outcome = trainer.fit()
    if runtime.is_main:
        _report(run, trainer, outcome)
    return 0


def _describe(run: RunConfig) -> None:
    write_config(run)
    keep_tokenizer(run)


def _report(run: RunConfig, trainer: Trainer, outcome: str) -> None:
    directory = Path(run.run.dir)
    try:
        drawn = f"Losses: {write_loss_plot(directory)}. Report: {write_report(directory)}."
    except OSError as error:  # the training is done and saved: a full disk must not turn it into a failure
        drawn = f"Losses and report could not be drawn: {error_text(error)}."
    print(f"{outcome} at step {trainer.position.step}. {drawn}")
    if outcome != "finished":
        print(f"Go on with the same command (run.dir={directory}).")
        return
    print(
        "Try next:\n"
        f"  mlite evaluate checkpoint={directory}\n"
        f"  mlite generate checkpoint={directory} prompt='def main('\n"
        f"  mlite convert source={directory} target={directory}/hf to=hf\n"
        f"  the same command with train.max_steps={2 * trainer.schedule.total_steps}: goes on from here to twice the length"
    )


def _acquire(lock: FileLock) -> None:
    lock.acquire()


def _silent(_text: str) -> None:
    """What the other ranks have to say."""
