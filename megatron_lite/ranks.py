"""How ranks agree on results and errors, over a gloo group that nothing else uses.

Notable features
- One primitive: every rank does its part, then all learn all results and all errors; either every rank goes
  on or every rank raises the same `CheckpointError`. No collective stands under a rank-0 guard.
- A rank that does not come is named, with the phase it was missed in, by gloo's monitored barrier.
- Without a group (one process) the same code runs without any communication.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_lite.errors import CheckpointError, error_text

T = TypeVar("T")


class Ranks:
    """The ranks that save and load together.

    group: a gloo group used for nothing else: a collective of a background save between two of the
        training's own would deadlock. None: one process.
    timeout_seconds: how long a rank waits for the others, slow writes included.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, timeout_seconds: float) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.timeout = timedelta(seconds=timeout_seconds)

    def agree(self, phase: str, work: Callable[[], T]) -> list[T]:
        """Run `work` here; return every rank's result, or raise on every rank with all error texts."""
        mine: tuple[bool, Any]
        try:
            mine = (True, work())
        except Exception as error:
            mine = (False, error_text(error))
        everyone = self._gather(phase, mine)
        failures = [f"rank {rank}: {text}" for rank, (fine, text) in enumerate(everyone) if not fine]
        if failures:
            raise CheckpointError("; ".join(failures) if self.size > 1 else str(everyone[0][1]))
        return [result for _, result in everyone]

    def first(self, phase: str, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone; every rank gets its result, or raises its error."""
        return self.agree(phase, work if self.rank == 0 else lambda: None)[0]  # type: ignore[return-value]

    def _gather(self, phase: str, mine: tuple[bool, Any]) -> list[tuple[bool, Any]]:
        if self.size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.size
        try:
            dist.monitored_barrier(self.group, timeout=self.timeout, wait_all_ranks=True)
            dist.all_gather_object(everyone, mine, group=self.group)
        except Exception as error:
            own = "" if mine[0] else f" (and this rank failed itself: {mine[1]})"
            raise CheckpointError(
                f"rank {self.rank} lost the other ranks in phase '{phase}' "
                f"(timeout {self.timeout.total_seconds():g} s): {error}{own}"
            ) from error
        return everyone
