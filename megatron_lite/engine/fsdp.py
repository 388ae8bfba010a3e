"""FSDP2: fp32 sharded master weights, computation in the chosen dtype, fp32 reduction, AdamW over the local shards.

Notable features:
- One process needs no wrapper and no process group: the same step runs on the plain module.
- `engine.shard=full` gathers a layer for forward and again for backward (ZeRO-3), embedding and head once for both; `optimizer`
  gathers all weights once a step and keeps them until its last backward (ZeRO-2); `none` keeps everything on every rank and only
  sums gradients: `build` gives it a mesh whose shard dimension is 1.
- Gradients are reduced on the last micro-batch only, as a sum: the loss was divided by the global token count before. Until then
  they are kept unsharded in fp32: with several micro-batches, 4 bytes for every parameter of a tensor-parallel shard.
- Clipping, the finite check and the update stay on the device: no step waits for a host sync.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from megatron_lite.data.packing import Batch
from megatron_lite.engine.base import BatchSums, StepResult, numerics_pieces
from megatron_lite.engine.replicas import Replicas
from megatron_lite.objectives.base import Objective
from megatron_lite.optim.optimizer import AdamW, OptimConfig
from megatron_lite.optim.spikes import Judge, not_finite
from megatron_lite.parallel.assemble import Distribute, undivided
from megatron_lite.parallel.global_view import State
from megatron_lite.parallel.layers import ShardInfo
from megatron_lite.parallel.mesh import Mesh, sum_over
from megatron_lite.parallel.sharded import fsdp_module, local_shard
from megatron_lite.precision.dtypes import computing_in
from megatron_lite.precision.numerics import numerics_of

SHARD_MODES = ("none", "optimizer", "full")


@dataclass
class FsdpConfig:
    """shard: what is sharded over the data-parallel ranks: none | optimizer | full. Context-parallel ranks shard in each of them.

    cpu_offload: shards live on the CPU.
    """

    name: ClassVar[str] = "fsdp"

    shard: str = "full"
    cpu_offload: bool = False

    @property
    def replicates(self) -> bool:
        """See `EngineConfig`."""
        return self.shard == "none"

    def validate(self) -> None:
        """Raise ValueError if `shard` is unknown."""
        if self.shard not in SHARD_MODES:
            raise ValueError(f"engine.shard={self.shard} is unknown; choose one of {', '.join(SHARD_MODES)}")

    def distribute(self, mesh: Mesh, dtype: torch.dtype) -> Distribute:
        """See `EngineConfig`: the layers and then the objective are sharded on the meta device, only shards get memory."""
        if mesh.device_mesh is None:
            return undivided
        # late: one process needs no FSDP2, which takes long to import
        from megatron_lite.engine.fsdp_sharding import sharding

        return sharding(mesh, dtype, reshard=self.shard == "full", cpu_offload=self.cpu_offload)

    def build(
        self,
        objective: Objective,
        *,
        optim: OptimConfig,
        dtype: torch.dtype,
        mesh: Mesh,
        shards: dict[str, ShardInfo],
    ) -> FsdpEngine:
        """See `EngineConfig`."""
        return FsdpEngine(
            objective, optim=optim, dtype=dtype, mesh=mesh, shards=shards, keep_gathered=self.shard != "full"
        )


def computing(dtype: torch.dtype, objective: nn.Module) -> AbstractContextManager[None]:
    """Inside, `objective` computes in `dtype`: FSDP2 does this itself; in a single process the parameters are cast here."""
    return nullcontext() if fsdp_module(objective) else computing_in(dtype, objective)


class FsdpEngine:
    """The engine over an objective that `FsdpConfig.distribute` divided; arguments as in `EngineConfig.build`.

    keep_gathered: weights stay gathered from a step's first forward to its last backward.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        optim: OptimConfig,
        dtype: torch.dtype,
        mesh: Mesh,
        shards: dict[str, ShardInfo],
        keep_gathered: bool = False,
    ) -> None:
        self.keep_gathered = keep_gathered
        self.objective, self.mesh, self.dtype, self.shards = objective, mesh, dtype, shards
        self.clip_grad = optim.clip_grad
        self.numerics = numerics_of(objective.decoder)
        self.replicas = Replicas(shards, mesh)
        self.parameters = dict(objective.decoder.named_parameters())
        local = {name: local_shard(parameter) for name, parameter in self.parameters.items()}
        self.optimizer = AdamW(local, optim, {name: info.kind for name, info in shards.items()})
        self.optimizer_device = next(iter(self.optimizer.parameters.values())).device  # the CPU with engine.cpu_offload

    def train_step(self, micro_batches: list[Batch], *, lr: float, judge: Judge = not_finite) -> StepResult:
        """See `Engine`."""
        keeps_weights = self.keep_gathered or not fsdp_module(self.objective)
        with self.numerics.step(keep_weights=keeps_weights):
            sums = self._backward(micro_batches, self.numerics.micro_batch)
        mean, parts = sums.means()
        gradients = self._take_gradients()
        self.replicas.take_first(gradients)
        norm = self._global_norm(gradients).to(mean.device)
        if self.clip_grad:
            scale = (self.clip_grad / (norm + 1e-6)).clamp(max=1.0).to(self.optimizer_device)
            torch._foreach_mul_(list(gradients.values()), scale)
        skipped = judge(mean, norm)
        self.optimizer.step(gradients, lr=lr, skip=skipped.to(self.optimizer_device))
        return StepResult(loss=mean, grad_norm=norm, valid_tokens=sums.tokens, skipped=skipped, parts=parts)

    def diagnose(self, micro_batches: list[Batch]) -> None:
        """See `Engine`."""
        self._backward(micro_batches, self.numerics.forward_only)
        self._take_gradients()

    def _backward(self, micro_batches: list[Batch], around: Callable[[], AbstractContextManager[None]]) -> BatchSums:
        """Forward and backward of every micro-batch, each within `around()`."""
        self._set_training(True)
        sums = BatchSums(micro_batches, self.mesh.loss_groups)
        for index, batch in enumerate(micro_batches):
            self._begin_micro_batch(last=index + 1 == len(micro_batches))
            with around(), computing(self.dtype, self.objective):
                loss = self.objective(batch)
                (loss.total / sums.num_tokens).backward()
            sums.add(loss)
        return sums

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Engine`."""
        self._set_training(False)
        with self.numerics.forward_only(), computing(self.dtype, self.objective):
            loss = self.objective(batch)
        return loss.total, loss.tokens

    def state(self) -> State:
        """See `Engine`. Raises RuntimeError if copies of a gradient differed (see `Replicas`)."""
        self.replicas.check()
        local = {f"model.{name}": tensor for name, tensor in self.optimizer.parameters.items()}
        local |= self.optimizer.moments()
        layout = self.mesh.layout
        pieces = {
            key: layout.piece(tensor, info.global_shape, tp_dim=info.tp_dim)
            for key, tensor in local.items()
            for info in [self.shards[key.split(".", 1)[1]]]
        }
        return State(pieces | numerics_pieces(self.numerics, layout), {"adam_step": self.optimizer.adam_step})

    def load_state(self, state: State) -> None:
        """See `Engine`. The shards are the live tensors: filling them loads the state."""
        self.optimizer.adam_step = state.counters["adam_step"]
        self._reshard()

    def _set_training(self, training: bool) -> None:
        # `train` walks over all modules, which a tiny model's step would notice
        if self.objective.training != training:
            self.objective.train(training)
            self._reshard()

    def _reshard(self) -> None:
        """Free what an evaluation has left gathered: a step gathers all weights itself, which counts them in FP8's histories, and
        loaded ones have other values."""
        for module in self.objective.modules():
            if fsdp_module(module):
                module.reshard()

    def _begin_micro_batch(self, *, last: bool) -> None:
        if fsdp_module(self.objective):
            self.objective.set_requires_gradient_sync(last)
            self.objective.set_is_last_backward(last)
            self.objective.set_reshard_after_backward(last or not self.keep_gathered)

    def _take_gradients(self) -> dict[str, Tensor]:
        """This rank's gradients by name, taken off the parameters; zeros where none arrived."""
        gradients = {}
        for name, parameter in self.parameters.items():
            local = self.optimizer.parameters[name]
            gradients[name] = torch.zeros_like(local) if parameter.grad is None else local_shard(parameter.grad)
            parameter.grad = None
        return gradients

    def _global_norm(self, gradients: dict[str, Tensor]) -> Tensor:
        """L2 norm over all ranks: every element of a global gradient counts once.

        A gradient that tensor parallelism did not cut is the same on all its ranks: only the first one counts it. The sum over all
        ranks is one all-reduce, which gives every rank the same bits. Sums over one group after another would not: ranks could clip
        by scales that differ in the last digit, and replicas would drift apart.
        """
        first = self.mesh.tp_rank == 0
        counted = [g for name, g in gradients.items() if first or self.shards[name].tp_dim is not None]
        squares = sum_of_squares(counted) / self.mesh.degrees.dp_replicate
        return sum_over(self.mesh.world, squares).sqrt()


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """0-dim sum of the squares of all elements. Of whole matrices torch's norm on the CPU adds up number by number, and is off by
    1e-4 at four million of them; of rows it is exact to 1e-7, as it is on a GPU."""
    if tensors[0].is_cpu:
        return torch.cat([torch.linalg.vector_norm(tensor, dim=-1).flatten() for tensor in tensors]).square().sum()
    return torch.stack(torch._foreach_norm(tensors)).square().sum()
