"""How ranks agree on results and errors, over a dedicated gloo group.

Notable features
- One primitive: every rank does its part, then all ranks learn whether any failed. Either every rank continues or every rank
  raises the same `CheckpointError`. No collective is called on only some of the ranks.
- Without errors the communication does not grow with the number of ranks: one flag is reduced. Error messages are gathered,
  truncated to `TEXT` characters each, only if a rank has one.
- A rank that does not arrive is named, with the phase, by gloo's monitored barrier.
- Without a group (one process) the same code runs without any communication.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_lite.errors import CheckpointError, error_text

T = TypeVar("T")

TEXT = 2000  # characters of an error that reach the other ranks


class Ranks:
    """The ranks that save and load together.

    group: a gloo group used for nothing else: a collective of a background save between two of the
        training's own would deadlock. None: one process.
    timeout_seconds: how long a rank waits for the others, slow writes included.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, timeout_seconds: float = 1800) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.timeout = timedelta(seconds=timeout_seconds)

    def agree(self, phase: str, work: Callable[[], T]) -> T:
        """Run `work` on every rank and return this rank's result, or raise on every rank with all error texts."""
        result, failure = _attempt(work)
        texts = self._texts(phase, failure)
        if texts:
            raise CheckpointError(self._joined(texts))
        return result  # type: ignore[return-value]

    def attempt(self, phase: str, work: Callable[[], T]) -> T:
        """As `agree`, but one process alone raises what `work` raises, in its own type."""
        return work() if self.size == 1 else self.agree(phase, work)

    def problems(self, phase: str, work: Callable[[], str | None]) -> dict[int, str]:
        """Run `work` on every rank; the texts that it returned, by rank, the same on every rank. It raises as `agree` does."""
        text, failure = _attempt(work)
        found = self._texts(phase, f"!{failure}" if failure else f"?{text}" if text else None)
        failures = {rank: text[1:] for rank, text in found.items() if text.startswith("!")}
        if failures:
            raise CheckpointError(self._joined(failures))
        return {rank: text[1:] for rank, text in found.items()}

    def first(self, phase: str, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone; every rank gets its result, or raises its error."""
        result, failure = _attempt(work) if self.rank == 0 else (None, None)
        if self.size > 1:
            answer: list[Any] = [(result, failure and failure[:TEXT])]
            self._together(phase, failure, lambda: dist.broadcast_object_list(answer, group=self.group, group_src=0))
            result, failure = answer[0]
        if failure is not None:
            raise CheckpointError(self._joined({0: failure}))
        return result  # type: ignore[return-value]

    def gather(self, phase: str, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank; rank 0 gets all results in order of rank, the others an empty list. It raises as `agree` does."""
        result = self.agree(phase, work)
        if self.size == 1:
            return [result]
        everyone: list[Any] | None = [None] * self.size if self.rank == 0 else None
        self._together(phase, None, lambda: dist.gather_object(result, everyone, group=self.group, group_dst=0))
        return everyone or []

    def sum(self, phase: str, values: torch.Tensor) -> torch.Tensor:
        """The sum of a CPU tensor of the same shape over all ranks, in place."""
        if self.size > 1:
            self._together(phase, None, lambda: dist.all_reduce(values, group=self.group))
        return values

    def _texts(self, phase: str, text: str | None) -> dict[int, str]:
        """What any rank has to say, by rank; empty when none does."""
        if self.size == 1:
            return {} if text is None else {0: text}
        flag = torch.tensor([text is not None], dtype=torch.int32)
        self._together(phase, text, lambda: dist.all_reduce(flag, group=self.group))
        if not flag.item():
            return {}
        everyone: list[Any] = [None] * self.size
        mine = text and text[:TEXT]
        self._together(phase, text, lambda: dist.all_gather_object(everyone, mine, group=self.group))
        return {rank: found for rank, found in enumerate(everyone) if found is not None}

    def _together(self, phase: str, own: str | None, collective: Callable[[], Any]) -> None:
        """A collective, after every rank has arrived. `own` is this rank's failure, which is reported even if other ranks
        are lost."""
        try:
            dist.monitored_barrier(self.group, timeout=self.timeout, wait_all_ranks=True)
            collective()
        except Exception as error:
            failed = f" (and this rank failed itself: {own})" if own else ""
            raise CheckpointError(
                f"rank {self.rank} lost the other ranks in phase '{phase}' "
                f"(timeout {self.timeout.total_seconds():g} s): {error}{failed}"
            ) from error

    def _joined(self, texts: dict[int, str]) -> str:
        return "; ".join(f"rank {rank}: {text}" for rank, text in texts.items()) if self.size > 1 else texts[0]


def _attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """(result, None), or (None, why it failed)."""
    try:
        return work(), None
    except Exception as error:
        return None, error_text(error)
