"""Keeps parameters that tensor parallelism replicates bit-identical on all tensor-parallel ranks.

Each tensor-parallel rank reduces the gradients of these parameters (norms, biases) over its own data-parallel group. NCCL
guarantees equal bits on the ranks of one call, but not between two communicators: with NVLink SHARP the sums may differ in
the last digit, and copies that are updated differently would stay different forever. So all ranks use the gradient of the
first tensor-parallel rank.

A larger difference means that a gradient was not summed over all ranks. It is recorded on the device and raised by `check`,
so that no step waits for it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.parallel.layers import ShardInfo
from megatron_lite.parallel.mesh import Mesh

# Relative to the tensor's largest element. Reordered fp32 sums of a thousand terms differ by 1e-6, a sum that misses a rank by 0.1.
TOLERANCE = 1e-3


class Replicas:
    """The parameters among `shards` of which every tensor-parallel rank holds a copy."""

    def __init__(self, shards: dict[str, ShardInfo], mesh: Mesh) -> None:
        several = mesh.tp_size > 1
        self.names = [name for name, info in shards.items() if several and info.tp_dim is None]
        self.mesh = mesh
        self._worst: Tensor | None = None  # by name, since the last check

    @torch.no_grad()
    def take_first(self, tensors: dict[str, Tensor]) -> None:
        """Overwrite this rank's copies with those of the first tensor-parallel rank: one broadcast for all of them."""
        if not self.names:
            return
        own = [tensors[name] for name in self.names]
        flat = torch.cat([tensor.flatten() for tensor in own])
        if flat.numel():  # a rank may hold no rows of so short tensors
            dist.broadcast(flat, group=self.mesh.group("tp"), group_src=0)
        first = [part.view_as(tensor) for part, tensor in zip(flat.split([t.numel() for t in own]), own)]
        self._note(own, first)
        torch._foreach_copy_(own, first)

    def _note(self, own: list[Tensor], first: list[Tensor]) -> None:
        largest = torch.stack([tensor.abs().amax() if tensor.numel() else tensor.new_zeros(()) for tensor in first])
        off = [(a - b).abs().amax() if a.numel() else a.new_zeros(()) for a, b in zip(own, first)]
        # not finite: the step is left out on every rank, for its norm is not finite either
        relative = torch.nan_to_num(torch.stack(off) / largest.clamp(min=1e-30), nan=0.0, posinf=0.0)
        self._worst = relative if self._worst is None else torch.maximum(self._worst, relative)

    def check(self) -> None:
        """Collective over all ranks. Raises RuntimeError on every one, with the name, if copies differed by more than `TOLERANCE`."""
        if self._worst is None:
            return
        dist.all_reduce(self._worst, op=dist.ReduceOp.MAX)
        worst, self._worst = self._worst.tolist(), None
        name, off = max(zip(self.names, worst), key=lambda found: found[1])
        if off > TOLERANCE:
            raise RuntimeError(
                f"{name!r} differed between tensor-parallel ranks by {off:.1e} of its gradient's largest element; the gradient of "
                "what parallel.tp does not cut must be summed over all of them"
            )
