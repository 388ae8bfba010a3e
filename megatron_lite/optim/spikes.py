"""Spikes: steps whose loss or gradient norm lies far above those of the steps before, or is not finite.

    x is a spike   <=>   x > median + threshold * max(1.4826 MAD, 0.01 median)

with the median, and MAD the median distance from it, over the last `window` steps that were none; 1.4826 MAD estimates the standard
deviation and, unlike it, does not grow with the very outliers that are looked for (Hampel 1974). Notable features:
- The verdict is computed on the device from the reduced loss and norm, so it is the same on all ranks and no step waits for the host.
- Spikes do not enter the window. Until the window is full, only what is not finite is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lite.optim.schedule import Progress

Judge = Callable[[Tensor, Tensor], Tensor]
"""(loss, gradient norm), 0-dim -> a 0-dim float tensor: 1.0 where the update is to be left out, else 0.0."""

_DEVIATIONS = 1.4826  # standard deviations of a normal distribution in its MAD
_LEAST = 0.01  # of the median: a very smooth curve must not make a spike of its next wiggle


def not_finite(loss: Tensor, grad_norm: Tensor) -> Tensor:
    """The judge of a run that ignores spikes."""
    return 1.0 - (torch.isfinite(loss) & torch.isfinite(grad_norm)).float()


@dataclass
class SpikeConfig:
    """window: steps that a spike is measured against. threshold: in standard deviations. A run that goes back stops at the spike
    after `max_rollbacks` times within `within_steps` steps."""

    window: int = 128
    threshold: float = 10.0
    max_rollbacks: int = 3
    within_steps: int = 1000

    def validate(self) -> None:
        """Raise ValueError naming the key if a value is invalid."""
        for key, least in (("window", 2), ("max_rollbacks", 0), ("within_steps", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"spike.{key}={getattr(self, key)} must be at least {least}")
        if not self.threshold > 0:
            raise ValueError(f"spike.threshold={self.threshold} must be above 0")


@dataclass(frozen=True)
class Spikes:
    """Spikes that the host has not read yet: how many, the step of the first, and the samples consumed up to the last one's end."""

    count: int
    first_step: int
    end_sample: int


class SpikeDetector:
    """The judge of a run that looks for spikes, and its state."""

    def __init__(self, config: SpikeConfig, *, device: torch.device) -> None:
        self.threshold = config.threshold
        self.recent = torch.full(
            (config.window, 2), torch.nan, device=device
        )  # (window, loss and norm), the oldest first
        self.unread = torch.zeros(3, dtype=torch.int64, device=device)  # the fields of `Spikes`

    def judge(self, at: Progress) -> Judge:
        """The judge of the step that ends at `at`; to be called once."""
        here = torch.tensor([1, at.step, at.consumed_samples])

        def judged(loss: Tensor, grad_norm: Tensor) -> Tensor:
            values = torch.stack([loss, grad_norm]).to(self.recent)
            spike = self._is_spike(values)
            self.recent = torch.where(spike, self.recent, torch.cat([self.recent[1:], values[None]]))
            unread, now = self.unread, here.to(self.unread.device, non_blocking=True)
            first = torch.where(unread[0] > 0, unread[1], now[1])
            self.unread = torch.where(spike, torch.stack([unread[0] + 1, first, now[2]]), unread)
            return spike.float()

        return judged

    def _is_spike(self, values: Tensor) -> Tensor:
        median = self.recent.median(dim=0).values  # NaN until the window is full, and nothing is above NaN
        spread = _DEVIATIONS * (self.recent - median).abs().median(dim=0).values
        limit = median + self.threshold * torch.maximum(spread, _LEAST * median)
        return (~torch.isfinite(values) | (values > limit)).any()

    def read(self) -> Spikes | None:
        """The spikes since the last time. Waits for the device."""
        found = Spikes(*self.unread.tolist())
        self.unread = torch.zeros_like(self.unread)
        return found if found.count else None

    def state(self) -> dict[str, Any]:
        """As JSON, exactly. Waits for the device."""
        rows = [row for row in self.recent.tolist() if row[0] == row[0]]
        return {"recent": rows, "unread": self.unread.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave, the newest rows where the window was another one. Raises ValueError for anything else."""
        try:
            rows = torch.tensor(state["recent"], dtype=torch.float32).reshape(-1, 2)[-len(self.recent) :]
            unread = torch.tensor([int(number) for number in state["unread"]])
            if unread.shape != (3,):
                raise ValueError("three numbers are needed")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"this is not a state of the spike detector: {error!r}") from error
        self.recent.fill_(torch.nan)
        if len(rows):
            self.recent[-len(rows) :] = rows.to(self.recent)
        self.unread = unread.to(self.unread)
