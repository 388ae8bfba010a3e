"""What the trainer asks of an engine.

An engine owns the wrapped objective and the optimizer. Losses are sums; they are divided once, by the number of counted tokens in
the whole global batch, before backward, so that neither accumulation nor layout changes the gradient's scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_lite.data.packing import Batch
from megatron_lite.parallel.global_view import State

__all__ = ["Batch", "Engine", "StepResult"]


@dataclass(frozen=True)
class StepResult:
    """0-dim device tensors, nothing synchronized: reading one waits for the device.

    loss: mean over the `valid_tokens` counted tokens of the global batch (nats). grad_norm: global L2 norm before clipping.
    skipped: 1.0 where loss or gradient was not finite and the update was left out, else 0.0.
    """

    loss: Tensor
    grad_norm: Tensor
    valid_tokens: Tensor
    skipped: Tensor


class Engine(Protocol):
    """One step, one evaluation, and the state of both model and optimizer in global names."""

    def train_step(self, micro_batches: list[Batch], *, lr: float) -> StepResult:
        """Forward, backward and update with this rank's micro-batches of one global batch."""

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(summed loss, counted tokens) of this rank's batch, without gradient."""

    def state(self) -> State:
        """This rank's pieces of the global tensors `<kind>.<name>` (`model`, `exp_avg`, `exp_avg_sq`, ..., buffers too), to be saved,
        or filled and loaded; and the counters (`adam_step`: optimizer updates done)."""

    def load_state(self, state: State) -> None:
        """Take over pieces that `state` gave and that were filled since (all, or only some), and the counters."""
