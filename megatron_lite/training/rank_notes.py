"""What the ranks publish about themselves in the process group's store: heartbeats, and notes about a hang."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

logger = logging.getLogger(__name__)


class RankNotes:
    """Notes of all ranks in the process group's store. Every call is short, and none needs another rank to be alive."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        # a connection of its own: the training's one may be waiting in a blocking call
        store: Any = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        store.set_timeout(timedelta(seconds=5))
        self._store = store
        self._before: dict[int, tuple[int, float]] = {}

    def publish(self, kind: str, note: dict[str, Any]) -> None:
        """Publish this rank's note."""
        with contextlib.suppress(RuntimeError):  # the store is gone; a hang is found without it
            self._store.set(f"watchdog/{kind}/{self.rank}", json.dumps(note))

    def read(self, kind: str) -> dict[int, dict[str, Any]]:
        """rank -> note, of the ranks that have published one."""
        found = {}
        try:
            for rank in range(self.ranks):
                key = f"watchdog/{kind}/{rank}"
                if self._store.check([key]):
                    found[rank] = json.loads(self._store.get(key))
        except RuntimeError:
            logger.warning("the store of the process group does not answer")
        return found

    def first_to_arrive(self, seconds: float) -> bool:
        """True on one rank, when all have arrived or `seconds` have passed; False on the others, when that rank has reported.

        Two counters, so that a job of thousands of ranks does not read thousands of notes thousands of times.
        """
        first = self._store.add("watchdog/arrived", 1) == 1
        end = time.monotonic() + seconds + (0.0 if first else 5.0)
        counter, enough = ("watchdog/arrived", self.ranks) if first else ("watchdog/reported", 1)
        while time.monotonic() < end and self._store.add(counter, 0) < enough:
            time.sleep(0.5)
        return first

    def report(self) -> None:
        """The verdict is written, the other ranks may end: the launcher ends all ranks as soon as one has ended."""
        self._store.add("watchdog/reported", 1)

    def is_reported(self) -> bool:
        """Whether the first rank to arrive has written its verdict."""
        try:
            return self._store.add("watchdog/reported", 0) > 0
        except RuntimeError:  # the store is gone
            return False

    def own_times(self) -> dict[int, float]:
        """rank -> own seconds per step since the last call, of ranks that have done a step."""
        times = {}
        for rank, note in self.read("beat").items():
            steps, own = self._before.get(rank, (0, 0.0))
            if note["steps"] > steps:
                times[rank] = (note["own"] - own) / (note["steps"] - steps)
                self._before[rank] = (note["steps"], note["own"])
        return times
