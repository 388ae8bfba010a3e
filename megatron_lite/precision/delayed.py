"""Delayed scaling: one scale a tensor, from the largest numbers of the last micro-batches.

    at the end of a micro-batch    amax   = max over the history, or the newest entry
                                   scale <- (largest / amax) / 2^margin      where amax is finite and not 0; else it stays
                                   the history moves on by one

(Micikevicius et al., arXiv 2209.05433; the rule is Transformer Engine's.) A scale is known before its tensor, so nothing waits for a
maximum; numbers that outgrow it saturate until it has followed.

Notable features:
- The scales and histories of all tensors of a model are two tensors, so that one step of all of them is a few operations, and one
  all-reduce makes them the same on every rank, whatever the layout.
- Row 0 of a history is being collected; rows H - 1, H - 2, ... are the micro-batches before, 0 where there were none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_lite.precision.formats import Format, largest_magnitude
from megatron_lite.precision.quantizers import Pair, with_scale

AMAX_COMPUTE = ("max", "most_recent")


class Histories:
    """The scales (S,) and histories (H, S) of S tensors. recording: whether what is quantized counts."""

    def __init__(
        self, formats: list[Format], *, length: int, margin: int, amax_compute: str, device: torch.device
    ) -> None:
        self.scale = torch.ones(len(formats), device=device)
        self.amax_history = torch.zeros(length, len(formats), device=device)
        self.largest = torch.tensor([form.largest / 2.0**margin for form in formats], device=device)
        self.amax_compute = amax_compute
        self.recording = False

    def record(self, index: int, amax: Tensor) -> None:
        """Count the largest number of tensor `index` of this micro-batch, if this is training."""
        if self.recording:
            running = self.amax_history[0, index]
            running.copy_(torch.maximum(running, amax))

    @torch.no_grad()
    def advance(self, reduce: Callable[[Tensor], Tensor] | None) -> None:
        """A micro-batch ends. reduce: the maximum over all ranks."""
        if reduce is not None:
            self.amax_history[0] = reduce(self.amax_history[0].clone())
        amax = self.amax_history[0] if self.amax_compute == "most_recent" else self.amax_history.amax(0)
        scale = (self.largest / amax).clamp(max=torch.finfo(torch.float32).max)
        self.scale.copy_(torch.where((amax > 0) & amax.isfinite(), scale, self.scale))
        self.amax_history.copy_(self.amax_history.roll(-1, 0))
        self.amax_history[0] = 0.0


class Kept(Protocol):
    """Where a quantizer finds the scale of its tensor, and leaves its largest number."""

    @property
    def scale(self) -> Tensor:
        """(S,)."""

    def record(self, index: int, amax: Tensor) -> None:
        """Count the largest number of tensor `index`."""


@dataclass(frozen=True)
class DelayedScaling:
    """Quantizes tensor `index` of `histories`."""

    format: Format
    histories: Kept
    index: int

    def pair(self, x: Tensor, amax: Tensor | None = None) -> Pair:
        """See `Quantizer`."""
        self.histories.record(self.index, largest_magnitude(x) if amax is None else amax)
        return with_scale(x, self.histories.scale[self.index], self.format)
