"""What the ranks publish about themselves in the process group's store: heartbeats, notes about a hang, the first failure."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

BEAT_SECONDS = 5.0  # between two heartbeats, at most
GONE = "gone"  # the phase of the last heartbeat of a rank that ended well
logger = logging.getLogger(__name__)
_jobs = itertools.count()  # one process group may serve several jobs, one after another: their notes must not mix


class RankNotes:
    """Notes of all ranks in the process group's store. Every call is short and works even if other ranks are dead."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        # a connection of its own: the training's one may be waiting in a blocking call
        store: Any = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        store.set_timeout(timedelta(seconds=5))
        self._store = dist.PrefixStore(f"watchdog/{next(_jobs)}", store)

    def publish(self, kind: str, note: dict[str, Any]) -> bool:
        """Publish this rank's note. Returns False if the store does not answer."""
        try:
            self._store.set(f"{kind}/{self.rank}", json.dumps(note))
        except RuntimeError:
            return False
        return True

    def read_one(self, kind: str, rank: int) -> dict[str, Any] | None:
        """The note of one rank; None if it has published none, or the store does not answer."""
        return self._get(f"{kind}/{rank}")

    def fail(self, note: dict[str, Any]) -> None:
        """Report a failure to all ranks. Only the first one of a job is kept, because later ones are usually its
        consequences."""
        with contextlib.suppress(RuntimeError):
            self._store.compare_set("failure", "", json.dumps(note))

    def failure(self) -> dict[str, Any] | None:
        """The first failure that a rank has reported."""
        return self._get("failure")

    def _get(self, key: str) -> dict[str, Any] | None:
        with contextlib.suppress(RuntimeError):
            return json.loads(self._store.get(key)) if self._store.check([key]) else None
        return None

    def read(self, kind: str) -> dict[int, dict[str, Any]]:
        """rank -> note, of the ranks that have published one."""
        found = {}
        try:
            for rank in range(self.ranks):
                key = f"{kind}/{rank}"
                if self._store.check([key]):
                    found[rank] = json.loads(self._store.get(key))
        except RuntimeError:
            logger.warning("the store of the process group does not answer")
        return found

    def first_to_arrive(self, seconds: float) -> bool:
        """True on one rank, when all have arrived or `seconds` have passed; False on the others, when that rank has reported.

        Two counters, so that a job of thousands of ranks does not read thousands of notes thousands of times.
        """
        first = self._store.add("arrived", 1) == 1
        end = time.monotonic() + seconds + (0.0 if first else 5.0)
        counter, enough = ("arrived", self.ranks) if first else ("reported", 1)
        while time.monotonic() < end and self._store.add(counter, 0) < enough:
            time.sleep(0.5)
        return first

    def is_first_to_report(self) -> bool:
        """True on the first rank that asks."""
        return self._store.add("reporters", 1) == 1

    def report(self) -> None:
        """Report that the verdict is written, so that the other ranks may exit: the launcher ends all ranks as soon as one
        has exited."""
        self._store.add("reported", 1)

    def is_reported(self) -> bool:
        """Whether the first rank to arrive has written its verdict."""
        try:
            return self._store.add("reported", 0) > 0
        except RuntimeError:  # the store is gone
            return False


class Others:
    """Whether another rank has failed: it reports a failure, or its heartbeat stops. Each rank watches the heartbeat of the
    next one, in a ring."""

    def __init__(self, notes: RankNotes, *, lost_seconds: float) -> None:
        self._notes, self._lost_seconds = notes, lost_seconds
        self._next = (notes.rank + 1) % notes.ranks
        self._beat: dict[str, Any] | None = None
        self._since = self._listened = 0.0  # when it was last renewed and last read, by this rank's clock
        self._failed_since: float | None = None

    def have_failed(self, now: float, *, patience: float) -> bool:
        """Whether a rank failed more than `patience` seconds before `now`. If the next rank in the ring is lost, this is
        reported to all ranks."""
        self._listen(now)
        if self._failed_since is None and self._notes.failure() is not None:
            self._failed_since = now
        return self._failed_since is not None and now - self._failed_since > patience

    def _listen(self, now: float) -> None:
        beat = self._notes.read_one("beat", self._next)
        stopped = now - self._listened > 3 * BEAT_SECONDS  # this rank itself was, as jobs are that a scheduler suspends
        if beat != self._beat or stopped:
            self._beat, self._since = beat, now
        self._listened = now
        silence = now - self._since
        if beat is None or beat["phase"] == GONE or not self._lost_seconds or silence <= self._lost_seconds:
            return
        where = {"rank": self._next, "step": beat["step"], "phase": beat["phase"]}
        self._notes.fail({**where, "text": f"no heartbeat for {silence:.0f} s, its process or its node is lost"})


def failure_text(failure: dict[str, Any]) -> str:
    """A failure's note in words."""
    return f"rank {failure['rank']} failed in step {failure['step']}, {failure['phase']}: {failure['text']}"
