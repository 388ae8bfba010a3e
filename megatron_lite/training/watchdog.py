"""Finds ranks that hang and ranks that are slow: a thread in every rank of a training job, from its start to its end.

    start:    enter("check run.dir", 0)  enter("prepare data", 0)  enter("build", 0)  enter("restore step_00000006", 0)
    loop:     enter("data", 7)  enter("train_step", 7)  enter("save", 7) ...
    thread:   looks at every tick where the loop is; publishes it in the process group's store

Notable features:
- Hang: when the loop has stayed in one phase for `timeout_seconds`, every rank that can writes the stacks of its threads (and on GPUs
  the flight recorder) to <run.dir>/hang, the ranks compare notes, one of them names the culprit in status.json, and all exit.
  Culprits are the ranks that do not answer, else those that are not waiting for other ranks.
- A rank whose interpreter is stuck (so that its watchdog thread cannot run either) is ended by faulthandler's C thread, stacks to
  stderr.
- Slow: a rank's own time is the time that it does not spend waiting in a collective, sampled from its stack at every tick. Where
  one rank's own time per step is `slow_factor` times the median, rank 0 warns. This sees the host only: a GPU that computes slowly
  while its host runs ahead shows where the host waits for it.
- No collective is used and nothing waits for the device. A single process has no watchdog.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from megatron_lite.background import within
from megatron_lite.runtime import Runtime
from megatron_lite.training.rank_notes import RankNotes
from megatron_lite.training.status import Status

logger = logging.getLogger(__name__)
EXIT_CODE = 3
_START, _END = "start", "end"  # phases in which the run directory must not be written yet, or any more
_DUMP_SECONDS, _SAY_SECONDS = 10.0, 2.0
_COUNTED = ("data", "train_step", "agree")  # phases that belong to a step
# A rank waits for others in torch's collectives, and in modules of ours that set `WAITS_FOR_OTHER_RANKS = True`.
_WAITING = "torch/distributed/"
_PASSED_THROUGH = (
    "torch/_ops.py",
    "torch/_library/",
    "torch/utils/",
    "torch/autograd/",
    "contextlib.py",
    "torch/_dynamo/",
)


@dataclass
class WatchdogConfig:
    """timeout_seconds: longest stay in one phase (building the model, a step, one validation batch, a save); 0: no watchdog.

    slow_factor: own time per step, relative to the median of all ranks, above which a rank is reported as slow; 0: never.
    report_seconds: how often ranks are compared.
    """

    timeout_seconds: float = 1800.0
    slow_factor: float = 1.5
    report_seconds: float = 60.0

    @property
    def group_seconds(self) -> float:
        """Timeout of the process group itself: longer, so that the watchdog, which knows the culprit, ends the job first."""
        return self.timeout_seconds + 60.0 if self.timeout_seconds > 0 else 1800.0

    def validate(self) -> None:
        """Raise ValueError naming the key if a value is invalid."""
        if self.timeout_seconds < 0:
            raise ValueError(f"watchdog.timeout_seconds={self.timeout_seconds} must not be negative; 0 switches it off")
        if self.slow_factor != 0 and self.slow_factor <= 1:
            raise ValueError(f"watchdog.slow_factor={self.slow_factor} must be above 1, or 0 to compare no ranks")
        if self.report_seconds <= 0:
            raise ValueError(f"watchdog.report_seconds={self.report_seconds} must be above 0")


class Watchdog:
    """A context manager around the job; `enter` says where its main thread is."""

    def __init__(self, config: WatchdogConfig, *, runtime: Runtime, run_dir: Path) -> None:
        self.config, self.runtime, self.run_dir = config, runtime, run_dir
        self.enabled = config.timeout_seconds > 0 and runtime.world_size > 1
        self._tick = min(0.1, config.timeout_seconds / 20)
        self._where = (0, _START, time.monotonic())
        self._steps, self._own = 0, 0.0
        self._loop = threading.get_ident()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._notes: RankNotes | None = None

    def enter(self, phase: str, step: int) -> None:
        """The loop begins `phase` of `step`."""
        if phase == "train_step":
            self._steps += 1
        self._where = (step, phase, time.monotonic())

    def end(self) -> None:
        """The training is over: a hang from here on ends the process and leaves status.json as it is."""
        self.enter(_END, self._where[0])

    def has_reported(self) -> bool:
        """Whether a rank's watchdog has written the verdict to status.json: errors of other ranks are then a consequence."""
        return self._notes is not None and self._notes.is_reported()

    @property
    def phase(self) -> str:
        """The phase that was entered last."""
        return self._where[1]

    def __enter__(self) -> Watchdog:
        if self.enabled:
            self._loop = threading.get_ident()
            self._where = (*self._where[:2], time.monotonic())
            self._notes = RankNotes(self.runtime.rank, self.runtime.world_size)
            self._thread = threading.Thread(target=self._watch, args=(self._notes,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            faulthandler.cancel_dump_traceback_later()
            self._thread.join(timeout=10)

    def _arm(self) -> None:
        """Set faulthandler's timer, which ends the process if this thread cannot: it needs no interpreter lock."""
        if sys.__stderr__ is not None:
            with contextlib.suppress(OSError, ValueError):  # no file behind it
                faulthandler.dump_traceback_later(self.config.timeout_seconds + 60, exit=True, file=sys.__stderr__)

    # ---- the thread

    def _watch(self, notes: RankNotes) -> None:
        last = compared = time.monotonic()
        published = last - 5.0  # the first note at once
        self._arm()
        while not self._ended.wait(self._tick):
            now = time.monotonic()
            step, phase, since = self._where
            if phase in _COUNTED and not waits_for_others(self._frame()):
                self._own += now - last
            last = now
            if now - since > self.config.timeout_seconds:
                self._end_the_job(notes, now - since)
            if now - published > min(5.0, self.config.timeout_seconds / 4, self.config.report_seconds / 2):
                notes.publish("beat", {"step": step, "phase": phase, "own": self._own, "steps": self._steps})
                published = now
                self._arm()
            if self.runtime.rank == 0 and self.config.slow_factor and now - compared > self.config.report_seconds:
                self._compare(notes)
                compared = now

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._loop)

    def _compare(self, notes: RankNotes) -> None:
        times = notes.own_times()
        slow = slow_ranks(times, self.config.slow_factor)
        if slow:
            typical = statistics.median(times.values())
            logger.warning(
                "slow: %s against a median of %.3f s over %d ranks (own time per step, waiting for others not counted)",
                ", ".join(f"rank {rank} {times[rank]:.3f} s" for rank in slow[:8]), typical, len(times),
            )  # fmt: skip

    def _end_the_job(self, notes: RankNotes, seconds: float) -> None:
        """Dump the stacks, compare notes, write the verdict, end this process. Never returns, whatever fails or hangs here."""
        try:
            rank, (step, phase, _) = self.runtime.rank, self._where

            def complain(reason: str) -> None:
                _say(f"rank {rank}: step {step}, {phase}: no progress for {seconds:.0f} s ({reason})")

            within(_DUMP_SECONDS, partial(self._dump, rank), name="the dump of the stacks", on_loss=complain)
            patience = min(20.0, max(3.0, self.config.timeout_seconds / 4))
            telling = partial(self._tell, notes, seconds=seconds, patience=patience)
            within(patience + 30.0, telling, name="the verdict", on_loss=complain)
        finally:
            os._exit(EXIT_CODE)

    def _tell(self, notes: RankNotes, *, seconds: float, patience: float) -> None:
        """Compare notes with the other ranks, for `patience` seconds; the first rank here says the verdict."""
        step, phase, _ = self._where
        frame = self._frame()
        notes.publish("hang", {"step": step, "phase": phase, "waits": waits_for_others(frame), "at": place(frame)})
        if not notes.first_to_arrive(patience):
            return
        verdict = self._verdict(notes.read("hang"), notes.read("beat"), seconds)
        _say(verdict)
        if phase not in (_START, _END):  # before, another process may own the run; after, its status is final
            status = Status(self.run_dir, main_process=True)
            status.write("failed", step, verdict, job=self.runtime.job, time=time.time())
            status.finish()
        notes.report()

    def _dump(self, rank: int) -> None:
        folder = self.run_dir / "hang"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank_{rank:05}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        recorder = "nccl" if self.runtime.device.type == "cuda" else "fr"  # NCCL keeps a recorder of its own
        record = getattr(torch._C._distributed_c10d, f"_dump_{recorder}_trace_json", None)
        if record is not None:
            (folder / f"rank_{rank:05}.flight.json").write_bytes(record())

    def _verdict(self, notes: dict[int, dict[str, Any]], beats: dict[int, dict[str, Any]], seconds: float) -> str:
        world = self.runtime.world_size
        silent = [rank for rank in range(world) if rank not in notes]
        busy = [rank for rank, note in notes.items() if not note["waits"]]
        parts = [f"no progress for {seconds:.0f} s (watchdog.timeout_seconds={self.config.timeout_seconds:g})"]
        for rank in silent[:8]:
            seen = beats.get(rank)
            last = f"last seen in step {seen['step']}, {seen['phase']}" if seen else "never seen"
            parts.append(f"rank {rank} does not answer ({last})")
        for rank in busy[:8]:
            note = notes[rank]
            parts.append(f"rank {rank} is stuck in step {note['step']}, {note['phase']}, at {note['at']}")
        waiting = sorted(set(notes) - set(busy))
        if waiting:
            first = notes[waiting[0]]
            verb = "wait" if len(waiting) > 1 else "waits"
            where = f"step {first['step']}, {first['phase']}, at {first['at']}"
            parts.append(f"{numbers(waiting)} {verb} for others in {where}")
        return "; ".join(parts) + f". Stacks: {self.run_dir}/hang"


def _say(text: str) -> None:
    """Print to standard error itself, which must not keep this process either."""
    shown = partial(print, f"watchdog: {text}", file=sys.__stderr__ or sys.stderr, flush=True)
    within(_SAY_SECONDS, shown, name="standard error", on_loss=lambda reason: None)


def waits_for_others(frame: FrameType | None) -> bool:
    """Whether the innermost frame, wrappers of torch left aside, is in a collective or waits for one."""
    while frame is not None and any(part in frame.f_code.co_filename for part in _PASSED_THROUGH):
        frame = frame.f_back
    if frame is None:
        return False
    return _WAITING in frame.f_code.co_filename or bool(frame.f_globals.get("WAITS_FOR_OTHER_RANKS"))


def place(frame: FrameType | None) -> str:
    """The innermost line outside of torch, e.g. `megatron_lite/engine/fsdp.py:131 train_step`."""
    while frame is not None and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return "an unknown place"
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-3:])}:{frame.f_lineno} {frame.f_code.co_name}"


def slow_ranks(times: dict[int, float], factor: float) -> list[int]:
    """Ranks whose own time is more than `factor` times the median, the slowest first."""
    if len(times) < 2:
        return []
    typical = statistics.median_low(times.values())  # of two ranks, the faster one
    return sorted((rank for rank, own in times.items() if own > factor * max(typical, 1e-3)), key=lambda r: -times[r])


def numbers(ranks: Sequence[int]) -> str:
    """`rank 3` or `ranks 0-2, 7`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
