"""Makes ranks slow or deaf: Python imports this at its start when this folder is on PYTHONPATH. Tests use it, nobody else.

SLOW_STEP=0.5        every training step takes that many seconds more
SLOW_SAVE=32         writing the tensors of a checkpoint takes that many seconds more
SLOW_RANK=1          only that rank (default: all)
HANG_STEP=7          the step that never ends (Python sleeps), on SLOW_RANK
HANG_UNTIL=/tmp/go   HANG_STEP ends when that file is there
HANG_IN=runtime:stop  that function never ends (Python sleeps), on SLOW_RANK; also checkpoint.store:CheckpointStore.load
STOP_STEP=7          the step in which the process is stopped (as by SIGSTOP), on SLOW_RANK
A job that Slurm restarted, or a group that torchrun restarted, runs at full speed.
UNDRAWN=1            a rank's `mlite train` draws nothing at its end, which takes longer than a tiny run's steps; also when restarted
"""

import importlib
import os
import signal
import sys
import time


def _slow(function, seconds):
    def slowed(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slowed


def _hang(until):
    while not os.path.exists(until):
        time.sleep(0.1)


def _at_step(function, step, act):
    calls = [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == step:
            act()
        return function(*args, **kwargs)

    return counted


def apply(settings):
    """Make this rank as slow or deaf as the settings say."""
    if "SLOW_SAVE" in settings:
        from megatron_lite.checkpoint import saving

        saving.write_groups = _slow(saving.write_groups, float(settings["SLOW_SAVE"]))
    if "HANG_IN" in settings:
        module, _, name = settings["HANG_IN"].partition(":")
        owner = importlib.import_module(f"megatron_lite.{module}")
        *owners, name = name.split(".")
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, _slow(getattr(owner, name), 10_000))
    from megatron_lite.engine.fsdp import FsdpEngine

    if "SLOW_STEP" in settings:
        FsdpEngine.train_step = _slow(FsdpEngine.train_step, float(settings["SLOW_STEP"]))
    if "HANG_STEP" in settings:
        hang = lambda: _hang(settings.get("HANG_UNTIL", ""))  # noqa: E731
        FsdpEngine.train_step = _at_step(FsdpEngine.train_step, int(settings["HANG_STEP"]), hang)
    if "STOP_STEP" in settings:
        stop = lambda: os.kill(os.getpid(), signal.SIGSTOP)  # noqa: E731
        FsdpEngine.train_step = _at_step(FsdpEngine.train_step, int(settings["STOP_STEP"]), stop)


def leave_drawings_out():
    """No loss.png and no report.html."""
    from megatron_lite.commands import train

    train.write_loss_plot = train.write_report = lambda directory: None


_asked = {key: value for key, value in os.environ.items() if key.startswith(("SLOW_", "HANG_", "STOP_"))}
_rank = os.environ.get("RANK")
_first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
_meant = _rank is not None and _asked.get("SLOW_RANK", _rank) == _rank
if _rank is not None and {"megatron_lite", "train"} <= set(sys.orig_argv):
    if _asked and _first and _meant:
        apply(_asked)  # before training is imported, which takes functions by name
    if "UNDRAWN" in os.environ:
        leave_drawings_out()
