"""The interface between trainer and engine, and what all engines share.

An engine owns the wrapped objective and the optimizer; what it trains is `objective.decoder`. Losses are sums; they are
divided once, by the number of counted tokens in the whole global batch, before backward, so that neither accumulation nor
layout changes the gradient's scale.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.data.packing import Batch
from megatron_lite.objectives.base import Loss, Objective
from megatron_lite.optim.optimizer import OptimConfig
from megatron_lite.optim.spikes import Judge, not_finite
from megatron_lite.parallel.assemble import Distribute
from megatron_lite.parallel.global_view import Layout, Piece, State
from megatron_lite.parallel.layers import ShardInfo
from megatron_lite.parallel.mesh import Mesh, sum_over
from megatron_lite.precision.numerics import Numerics


@dataclass(frozen=True)
class StepResult:
    """0-dim device tensors, nothing synchronized: reading one waits for the device.

    loss: mean over the `valid_tokens` counted tokens of the global batch (nats). grad_norm: global L2 norm before clipping.
    skipped: 1.0 where the update was left out by the step's judge, as it is where loss or gradient is not finite, else 0.0.
    parts: means over the same tokens of what the objective reports beside the loss.
    """

    loss: Tensor
    grad_norm: Tensor
    valid_tokens: Tensor
    skipped: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Engine(Protocol):
    """One step, one evaluation, and the state of both model and optimizer in global names.

    numerics: how the linear layers of what it trains compute.
    """

    numerics: Numerics

    def train_step(self, micro_batches: list[Batch], *, lr: float, judge: Judge = not_finite) -> StepResult:
        """Forward, backward and update with this rank's micro-batches of one global batch.

        `judge` is called once, with the reduced loss and gradient norm, and decides on the device whether the update is left out.
        """

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(summed cross-entropy, counted tokens) of this rank's batch, without gradient."""

    def diagnose(self, micro_batches: list[Batch]) -> None:
        """Run this rank's micro-batches of one global batch through the weights for whoever collects from `numerics`: forward and, where
        the engine can drop its gradients, backward. Changes nothing."""

    def state(self) -> State:
        """This rank's shards of the global tensors `<kind>.<name>` (`model`, `exp_avg`, `exp_avg_sq`, and what `Numerics` keeps), to be
        saved, or filled and loaded; and the counters (`adam_step`: optimizer updates done)."""

    def load_state(self, state: State) -> None:
        """Load shards that `state` returned and that were filled since (all, or only some), and the counters."""


class EngineConfig(Protocol):
    """The `engine` section of a run: an engine's settings, and how to build it. A dataclass, registered as a schema."""

    name: ClassVar[str]

    @property
    def replicates(self) -> bool:
        """Whether every data-parallel rank holds everything: the mesh then counts them all as `dp_replicate`."""

    def validate(self) -> None:
        """Raise ValueError naming the key if a value is invalid."""

    def distribute(self, mesh: Mesh, dtype: torch.dtype) -> Distribute:
        """The function that shards the objective over the data-parallel ranks during assembly, for computation in
        `dtype`."""

    def build(
        self,
        objective: Objective,
        *,
        optim: OptimConfig,
        dtype: torch.dtype,
        mesh: Mesh,
        shards: dict[str, ShardInfo],
    ) -> Engine:
        """The engine over an assembled objective that `distribute` divided.

        shards: for every parameter of the decoder its global shape and its tensor-parallel dimension.
        """


def numerics_pieces(numerics: Numerics, layout: Layout) -> dict[str, Piece]:
    """What `numerics` keeps, which is the same on every rank."""
    return {name: layout.piece(t, t.shape, dp_sharded=False) for name, t in numerics.tensors().items()}


class BatchSums:
    """The sums of one global batch: counts its tokens first, takes each micro-batch's loss, gives the means."""

    def __init__(self, micro_batches: list[Batch], groups: list[dist.ProcessGroup]) -> None:
        """groups: summing over each in turn sums over all tokens of the global batch (`Mesh.loss_groups`)."""
        self.groups = groups
        self.tokens = sum_over(groups, torch.stack([torch.count_nonzero(b["loss_mask"]) for b in micro_batches]).sum())
        self.num_tokens = self.tokens.clamp(min=1)  # what losses are divided by
        self._names: list[str] = []
        self._sums: Tensor | None = None

    def add(self, loss: Loss) -> None:
        """Take one micro-batch's loss."""
        self._names = list(loss.parts)
        sums = torch.stack([value.detach() for value in (loss.total, *loss.parts.values())])
        self._sums = sums if self._sums is None else self._sums + sums

    def means(self) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, parts) as means over the counted tokens of the global batch. Collective over the groups."""
        assert self._sums is not None, "a step has at least one micro-batch"
        loss, *parts = (sum_over(self.groups, self._sums) / self.num_tokens).unbind()
        return loss, dict(zip(self._names, parts))
