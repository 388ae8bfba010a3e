"""FSDP2: fp32 sharded master weights, computation in the chosen dtype, fp32 reduction, AdamW over the local shards.

Notable features:
- One process needs no wrapper and no process group: the same step runs on the plain module.
- `engine.shard=full` gathers a layer for forward and again for backward (ZeRO-3), embedding and head once for both; `optimizer`
  keeps all gathered weights in between (ZeRO-2); `none` keeps everything on every rank and only sums gradients: `build` gives it
  a mesh whose shard dimension is 1.
- Gradients are reduced on the last micro-batch only, as a sum: the loss was divided by the global token count before.
- Clipping, the finite check and the update stay on the device: nothing in a step waits for a number.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from megatron_lite.engine.base import Batch, StepResult
from megatron_lite.optim.optimizer import AdamW, OptimConfig
from megatron_lite.parallel.global_view import Layout, State
from megatron_lite.parallel.layers import ShardInfo
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.precision.dtypes import call_in, computing_in

SHARD_MODES = ("none", "optimizer", "full")


@dataclass
class FsdpConfig:
    """shard: what is sharded over the data-parallel ranks: none | optimizer | full. cpu_offload: shards live on the CPU."""

    kind: str = "fsdp"
    shard: str = "full"
    cpu_offload: bool = False

    @property
    def replicates(self) -> bool:
        """Whether every data-parallel rank holds everything."""
        return self.shard == "none"

    def validate(self) -> None:
        """Raise ValueError naming the key whose value cannot be."""
        if self.kind != "fsdp":
            raise ValueError(f"engine.kind={self.kind} is not to be set: choose engine=fsdp or engine=deepspeed")
        if self.shard not in SHARD_MODES:
            raise ValueError(f"engine.shard={self.shard} is unknown; choose one of {', '.join(SHARD_MODES)}")


def sharder(config: FsdpConfig, mesh: Mesh | None, dtype: torch.dtype) -> Callable[[nn.Module], None]:
    """A function that shards one materialized module over the data-parallel ranks (without a mesh: leaves it alone)."""
    if mesh is None:
        return lambda module: None
    policy = MixedPrecisionPolicy(param_dtype=None if dtype is torch.float32 else dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if config.cpu_offload else OffloadPolicy()

    def shard(module: nn.Module) -> None:
        fully_shard(
            module,
            mesh=mesh.data_parallel,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=config.shard == "full",
        )
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # a plain sum: gloo knows no scaled one

    return shard


class FsdpEngine:
    """The engine over a materialized objective whose layers have gone through `sharder`.

    shards: for every trained parameter (named as in the decoder) its global shape and its tensor-parallel dimension.
    mesh: None for one process.
    """

    def __init__(
        self,
        objective: nn.Module,
        *,
        config: FsdpConfig,
        optim: OptimConfig,
        dtype: torch.dtype,
        mesh: Mesh | None,
        shards: dict[str, ShardInfo],
    ) -> None:
        sharder(config, mesh, dtype)(objective)
        if isinstance(objective, FSDPModule):  # embedding and head: backward begins where forward ends, so they stay
            objective.set_reshard_after_forward(False, recurse=False)
        self.objective, self.mesh, self.dtype, self.shards = objective, mesh, dtype, shards
        self.clip_grad = optim.clip_grad
        self.named = {
            name.removeprefix("decoder."): parameter
            for name, parameter in objective.named_parameters()
            if parameter.requires_grad
        }
        self.optimizer = AdamW({name: _local(p) for name, p in self.named.items()}, optim)
        self.home = next(iter(self.optimizer.parameters.values())).device  # the CPU with engine.cpu_offload

    def train_step(self, micro_batches: list[Batch], *, lr: float) -> StepResult:
        """See `Engine`."""
        valid = self._sum(torch.stack([torch.count_nonzero(b["loss_mask"]) for b in micro_batches]).sum())
        share = valid.clamp(min=1)
        total = torch.zeros((), device=valid.device)
        for index, batch in enumerate(micro_batches):
            self._synchronize_gradients(index + 1 == len(micro_batches))
            with computing_in(self.dtype, self.objective) if self.mesh is None else nullcontext():
                loss, _ = self.objective(batch)
                (loss / share).backward()
            total += loss.detach()
        loss = self._sum(total) / share
        gradients = self._take_gradients()
        norm = self._global_norm(gradients).to(loss.device)
        if self.clip_grad:
            scale = (self.clip_grad / (norm + 1e-6)).clamp(max=1.0).to(self.home)
            torch._foreach_mul_(list(gradients.values()), scale)
        skipped = 1.0 - (torch.isfinite(norm) & torch.isfinite(loss)).float()
        self.optimizer.step(gradients, lr=lr, skip=skipped.to(self.home))
        return StepResult(loss=loss, grad_norm=norm, valid_tokens=valid, skipped=skipped)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Engine`."""
        if self.mesh is None:
            return call_in(self.dtype, self.objective, batch)
        return self.objective(batch)

    def state(self) -> State:
        """See `Engine`."""
        local = {f"model.{name}": tensor for name, tensor in self.optimizer.parameters.items()}
        local |= self.optimizer.moments()
        layout = Layout() if self.mesh is None else self.mesh.layout
        pieces = {
            key: layout.piece(tensor, info.global_shape, tp_dim=info.tp_dim)
            for key, tensor in local.items()
            for info in [self.shards[key.split(".", 1)[1]]]
        }
        return State(pieces, {"adam_step": self.optimizer.adam_step})

    def load_state(self, state: State) -> None:
        """See `Engine`. The pieces are the live tensors: filled, they are loaded."""
        self.optimizer.adam_step = state.counters["adam_step"]

    def _synchronize_gradients(self, enabled: bool) -> None:
        if isinstance(self.objective, FSDPModule):
            self.objective.set_requires_gradient_sync(enabled)
            self.objective.set_is_last_backward(enabled)

    def _take_gradients(self) -> dict[str, Tensor]:
        """This rank's gradients by name, taken off the parameters; zeros where none arrived."""
        gradients = {}
        for name, parameter in self.named.items():
            local = self.optimizer.parameters[name]
            gradients[name] = torch.zeros_like(local) if parameter.grad is None else _local(parameter.grad)
            parameter.grad = None
        return gradients

    def _global_norm(self, gradients: dict[str, Tensor]) -> Tensor:
        """L2 norm over all ranks: every element of a global gradient counts once.

        A gradient that tensor parallelism did not cut is the same on all its ranks: only the first one counts it.
        """
        first = self.mesh is None or self.mesh.tp_rank == 0
        counted = [g for name, g in gradients.items() if first or self.shards[name].tp_dim is not None]
        squares = sum_of_squares(counted)
        if self.mesh is not None:
            for group in self.mesh.shard_groups:
                dist.all_reduce(squares, group=group)
        return squares.sqrt()

    def _sum(self, value: Tensor) -> Tensor:
        """Sum over the data-parallel ranks, in place (the ranks of one tensor-parallel group see the same samples)."""
        if self.mesh is not None:
            for group in self.mesh.data_groups:
                dist.all_reduce(value, group=group)
        return value


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """0-dim sum of the squares of all elements. Of whole matrices torch's norm on the CPU adds up number by number, and is off by
    1e-4 at four million of them; of rows it is exact to 1e-7, as it is on a GPU."""
    if tensors[0].is_cpu:
        return torch.cat([torch.linalg.vector_norm(tensor, dim=-1).flatten() for tensor in tensors]).square().sum()
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


def _local(tensor: Tensor) -> Tensor:
    """The plain local tensor, sharing its memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
