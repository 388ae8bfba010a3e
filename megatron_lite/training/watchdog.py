"""A thread in every rank of a training job, from its start to its end, that finds hanging, failed and slow ranks.

    start:    enter("check run.dir", 0)  enter("prepare data", 0)  enter("build", 0)  enter("restore step_00000006", 0)
    loop:     enter("data", 7)  enter("train_step", 7)  enter("save", 7) ...
    thread:   looks at every tick where the loop is; publishes it in the process group's store

Notable features:
- Hang: when the loop has stayed in one phase for `timeout_seconds`, every rank that can writes the stacks of its threads and the
  flight recorder to <run.dir>/hang, the ranks compare notes, one of them names the culprit in status.json (see `hang`), all exit.
- Failure: a rank that fails reports this through the store; one that is killed or whose node is lost stops renewing its
  heartbeat, which the previous rank notices. gloo then raises on the other ranks, but NCCL does not: they would wait forever
  in a kernel. So a rank that is still running a few seconds later exits, naming the rank that failed first.
- A rank whose interpreter is stuck (so that its watchdog thread cannot run either) is ended by faulthandler's C thread, stacks to
  stderr.
- Slow: if a rank's own time per step, which it does not wait for others, is `slow_factor` times the median, rank 0 prints a
  warning (see `slow`).
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType

from megatron_lite.background import within
from megatron_lite.errors import error_text
from megatron_lite.runtime import Runtime
from megatron_lite.training.hang import has_unfinished_collective, place, verdict, waits_for_others
from megatron_lite.training.rank_notes import BEAT_SECONDS, GONE, Others, RankNotes, failure_text
from megatron_lite.training.slow import Comparison, GpuOwnTime, OwnTime, flight_record, slow_ranks
from megatron_lite.training.status import Status

logger = logging.getLogger(__name__)
EXIT_CODE = 3
_START, _END = "start", "end"  # phases in which the run directory must not be written yet, or any more
_DUMP_SECONDS, _TELL_SECONDS, _SAY_SECONDS = 10.0, 20.0, 2.0
_COUNTED = ("data", "train_step", "agree")  # phases that belong to a step
_SECONDS_TO_FOLLOW = 10.0  # for a rank to end by itself once another one has failed
_SECONDS_TO_LEAVE = 60.0  # for one that is on its way out: trackers are closed, the run directory is described


@dataclass
class WatchdogConfig:
    """timeout_seconds: longest stay in one phase (building the model, a step, one validation batch, a save); 0: no watchdog.

    slow_factor: own time per step, relative to the median of all ranks, above which a rank is reported as slow; 0: never.
    report_seconds: how often ranks are compared.
    lost_seconds: age of a heartbeat (sent every 5 s) at which its rank counts as lost and the job ends; 0: never.
    """

    timeout_seconds: float = 1800.0
    slow_factor: float = 1.5
    report_seconds: float = 60.0
    lost_seconds: float = 40.0

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
        if self.lost_seconds != 0 and self.lost_seconds < 15:
            raise ValueError(
                f"watchdog.lost_seconds={self.lost_seconds} must be at least 15, three heartbeats, or 0 to count no rank as lost"
            )


class Watchdog:
    """A context manager around the job; `enter` says where its main thread is."""

    def __init__(self, config: WatchdogConfig, *, runtime: Runtime, run_dir: Path) -> None:
        self.config, self.runtime, self.run_dir = config, runtime, run_dir
        self.enabled = config.timeout_seconds > 0 and runtime.world_size > 1
        self._tick = min(0.1, config.timeout_seconds / 20)
        self._where = (0, _START, time.monotonic())
        self._entered, self._steps = 0, 0
        on_gpu, record = runtime.device.type == "cuda", partial(flight_record, runtime.device)
        self._own = GpuOwnTime(record, every=config.report_seconds / 2) if on_gpu else OwnTime()
        self._comparison = Comparison()
        self._leaving = False
        self._loop = threading.get_ident()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._notes: RankNotes | None = None

    def enter(self, phase: str, step: int) -> None:
        """The loop begins `phase` of `step`."""
        self._entered += 1
        if phase == "train_step":
            self._steps += 1
        self._where = (step, phase, time.monotonic())

    def end(self) -> None:
        """The training is over: a hang from here on ends the process and leaves status.json as it is."""
        self.enter(_END, self._where[0])

    def has_reported(self) -> bool:
        """Whether a rank's watchdog has written the verdict to status.json: errors of other ranks are then a consequence."""
        return self._notes is not None and self._notes.is_reported()

    def fail(self, text: str) -> None:
        """Report to the other ranks that this rank fails with `text`."""
        step, phase, _ = self._where
        self._leaving = True
        if self._notes is not None:
            self._notes.fail({"rank": self.runtime.rank, "step": step, "phase": phase, "text": text[:500]})

    def failed_first(self) -> str | None:
        """The rank that failed first, where and why, if any failure has been reported."""
        failure = self._notes.failure() if self._notes is not None else None
        return failure_text(failure) if failure else None

    def note_failure(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What an `ExitStack` calls (`push`) when the job ends, before anything that may wait for other ranks."""
        if error is not None:
            self.fail(error_text(error))

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
        if self._notes is not None and error is None:
            self._notes.publish("beat", {"phase": GONE, "step": 0, **OwnTime().note()})

    def _arm(self) -> None:
        """Set faulthandler's timer, which ends the process if this thread cannot: it needs no interpreter lock."""
        if sys.__stderr__ is not None:
            with contextlib.suppress(OSError, ValueError):  # no file behind it
                faulthandler.dump_traceback_later(self.config.timeout_seconds + 60, exit=True, file=sys.__stderr__)

    # ---- the thread

    def _watch(self, notes: RankNotes) -> None:
        last = compared = heard = time.monotonic()
        published = last - BEAT_SECONDS  # the first note at once
        number = 0
        others = Others(notes, lost_seconds=self.config.lost_seconds)
        self._arm()
        while not self._ended.wait(self._tick):
            now = time.monotonic()
            step, phase, since = self._where
            if phase in _COUNTED:
                self._own.add(now - last, frame=self._frame(), steps=self._steps)
            last = now
            if now - since > self.config.timeout_seconds:
                self._end_the_job(notes, now - since)
            if now - published > min(BEAT_SECONDS, self.config.timeout_seconds / 4, self.config.report_seconds / 2):
                number += 1
                beat = {"step": step, "phase": phase, "number": number, **self._own.note()}
                heard = now if notes.publish("beat", beat) else heard
                published = now
                self._arm()
                if others.have_failed(now, patience=_SECONDS_TO_LEAVE if self._leaving else _SECONDS_TO_FOLLOW):
                    self._follow(notes)
                if self.config.lost_seconds and now - heard > self.config.lost_seconds and phase != _END:
                    self._end_without_a_store(now - heard)
            if self.runtime.rank == 0 and self.config.slow_factor and now - compared > self.config.report_seconds:
                self._compare(notes)
                compared = now

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._loop)

    def _compare(self, notes: RankNotes) -> None:
        times = self._comparison.own_times(notes.read("beat"))
        slow = slow_ranks(times, self.config.slow_factor)
        if slow:
            typical = statistics.median(times.values())
            logger.warning(
                "slow: %s against a median of %.3f s over %d ranks (own time per step, waiting for others not counted)",
                ", ".join(f"rank {rank} {times[rank]:.3f} s" for rank in slow[:8]), typical, len(times),
            )  # fmt: skip

    def _end_the_job(self, notes: RankNotes, seconds: float) -> None:
        """Dump the stacks, compare notes, write the verdict, end this process. Never returns, whatever fails or hangs here."""
        rank, (step, phase, _) = self.runtime.rank, self._where

        def complain(reason: str) -> None:
            _say(f"rank {rank}: step {step}, {phase}: no progress for {seconds:.0f} s ({reason})")

        try:
            record: list[bytes] = []
            what = "the dump of the stacks"
            within(_DUMP_SECONDS, lambda: record.extend(self._dump(rank)), name=what, on_loss=complain)
            patience = min(20.0, max(3.0, self.config.timeout_seconds / 4))
            telling = partial(self._tell, notes, record=record, seconds=seconds, patience=patience)
            within(patience + 30.0, telling, name="the verdict", on_loss=complain)
        finally:
            os._exit(EXIT_CODE)

    def _tell(self, notes: RankNotes, *, record: list[bytes], seconds: float, patience: float) -> None:
        """Compare notes with the other ranks, for `patience` seconds; the first rank here says the verdict."""
        step, phase, _ = self._where
        frame, on_gpu = self._frame(), self.runtime.device.type == "cuda"
        waits = has_unfinished_collective(record[0]) if on_gpu and record else waits_for_others(frame)
        note = {"step": step, "phase": phase, "entered": self._entered, "waits": waits, "at": place(frame)}
        notes.publish("hang", note)
        if not notes.first_to_arrive(patience):
            return
        found = [f"no progress for {seconds:.0f} s (watchdog.timeout_seconds={self.config.timeout_seconds:g})"]
        world = self.runtime.world_size
        found += verdict(notes.read("hang"), last_seen=notes.read("beat"), world_size=world, on_gpu=on_gpu)
        self._write("; ".join(found) + f". Stacks: {self.run_dir}/hang")
        notes.report()

    def _follow(self, notes: RankNotes) -> None:
        """Another rank has failed and this one has not ended by itself: end it. Never returns."""

        def tell() -> None:
            if notes.is_first_to_report():
                self._write(self.failed_first() or "another rank failed")
                notes.report()

        try:
            within(_TELL_SECONDS, tell, name="the failure of another rank", on_loss=_say)
        finally:
            os._exit(EXIT_CODE)

    def _end_without_a_store(self, seconds: float) -> None:
        """The host of the store, where rank 0 runs, is lost, so no rank can be reached any more. Never returns."""
        step, phase, _ = self._where
        text = f"rank {self.runtime.rank} in step {step}, {phase}: no answer for {seconds:.0f} s from the process group's store, "
        text += "which the node of rank 0 holds"
        last = self.runtime.rank == self.runtime.world_size - 1  # one of those that may be left
        tell = partial(self._write if last else _say, text)
        try:
            within(_TELL_SECONDS, tell, name="the loss of the store", on_loss=_say)
        finally:
            os._exit(EXIT_CODE)

    def _write(self, text: str) -> None:
        """Say it on stderr and in status.json, if the run is this job's: before, another may own it; after, its status is final."""
        step, phase, _ = self._where
        _say(text)
        if phase not in (_START, _END):
            status = Status(self.run_dir, main_process=True)
            status.write("failed", step, text, job=self.runtime.job, time=time.time())
            status.finish()

    def _dump(self, rank: int) -> list[bytes]:
        """Write this rank's stacks and its flight recorder, and return what that has recorded, if there is one."""
        folder = self.run_dir / "hang"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank_{rank:05}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        recorded = flight_record(self.runtime.device)
        if recorded is None:
            return []
        (folder / f"rank_{rank:05}.flight.json").write_bytes(recorded)
        return [recorded]


def _say(text: str) -> None:
    """Print to standard error itself, which must not keep this process either."""
    shown = partial(print, f"watchdog: {text}", file=sys.__stderr__ or sys.stderr, flush=True)
    within(_SAY_SECONDS, shown, name="standard error", on_loss=lambda reason: None)
