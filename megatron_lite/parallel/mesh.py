"""Which process does what: the grid dp_replicate x dp_shard x tp.

Notable features:
- Tensor parallelism is the innermost dimension: its ranks are neighbors, so it stays inside a node as long as tp is at
  most the number of GPUs there. dp_shard comes next, dp_replicate (HSDP, arXiv 2304.11277 section 3.2.2) is outermost.
- The data-parallel degree is derived from the number of processes; what does not fit is refused with the numbers and a
  degree that would.
- One process has no mesh (`None`) and no process group: the model stays plain PyTorch.

world size = dp_replicate x dp_shard x tp,  rank = (replicate rank x dp_shard + shard rank) x tp + tp rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_lite.parallel.global_view import Layout

RECOMPUTE_MODES = ("none", "selective", "full")


@dataclass
class ParallelConfig:
    """How one model and one batch are divided over the processes.

    tp: tensor-parallel degree, the processes that share one layer's matrices.
    dp_shard: processes over which the engine shards weights, gradients and optimizer state; None: all that are left.
    dp_replicate: copies of that sharded model (HSDP).
    sequence_parallel: norms and residual stream cut along the sequence over the tensor-parallel processes.
    recompute: activations recomputed in backward: none | selective (all but matrix products) | full (whole layers).
    compile: `torch.compile` for each layer.
    """

    tp: int = 1
    dp_shard: int | None = None
    dp_replicate: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    compile: bool = False

    def validate(self, world_size: int) -> None:
        """Raise ValueError naming the keys and a value that would work."""
        if self.recompute not in RECOMPUTE_MODES:
            raise ValueError(
                f"parallel.recompute={self.recompute} is unknown; choose one of {', '.join(RECOMPUTE_MODES)}"
            )
        self.degrees(world_size)

    def degrees(self, world_size: int) -> tuple[int, int, int]:
        """(dp_replicate, dp_shard, tp), with dp_shard derived where it is not given. Raises ValueError as `validate`."""
        for key, value in (("tp", self.tp), ("dp_shard", self.dp_shard), ("dp_replicate", self.dp_replicate)):
            if value is not None and value < 1:
                raise ValueError(f"parallel.{key}={value} must be at least 1")
        fixed = self.tp * self.dp_replicate
        if world_size % fixed:
            raise ValueError(
                f"dp_replicate({self.dp_replicate}) x tp({self.tp}) = {fixed} does not divide the world size "
                f"{world_size} (number of processes); {_way_out(self.tp, self.dp_replicate, world_size)}"
            )
        derived = world_size // fixed
        if self.dp_shard not in (None, derived):
            raise ValueError(
                f"dp_replicate({self.dp_replicate}) x dp_shard({self.dp_shard}) x tp({self.tp}) = "
                f"{fixed * self.dp_shard} != world size {world_size} (number of processes); set "
                f"parallel.dp_shard={derived} (or null to derive it), or start {fixed * self.dp_shard} processes"
            )
        return self.dp_replicate, derived, self.tp


def _way_out(tp: int, dp_replicate: int, world_size: int) -> str:
    """What to change when dp_replicate x tp does not divide the world size."""
    if world_size % dp_replicate == 0:
        return f"parallel.tp={_degree_that_divides(tp, world_size // dp_replicate)} would work"
    if world_size % tp == 0:
        return f"parallel.dp_replicate={_degree_that_divides(dp_replicate, world_size // tp)} would work"
    return f"parallel.tp={_degree_that_divides(tp, world_size)} with parallel.dp_replicate=1 would work"


def _degree_that_divides(wanted: int, number: int) -> int:
    """The largest divisor of `number` that is at most `wanted`."""
    return max(degree for degree in range(1, wanted + 1) if number % degree == 0)


@dataclass(frozen=True)
class Mesh:
    """This process's place in the grid and the groups it speaks to.

    device_mesh has the dimensions dp_replicate, dp_shard, tp (any of them may be 1).
    """

    device_mesh: DeviceMesh

    @property
    def tp_rank(self) -> int:
        """Place among the processes that share a layer's matrices."""
        return self.device_mesh.get_local_rank("tp")

    @property
    def tp_size(self) -> int:
        """Number of processes that share a layer's matrices."""
        return self._size("tp")

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """The processes that share a layer's matrices and see the same samples."""
        return self.device_mesh.get_group("tp")

    @property
    def data_parallel(self) -> DeviceMesh:
        """What `fully_shard` takes: (dp_shard), or (dp_replicate, dp_shard) when there are replicas."""
        if self._size("dp_replicate") == 1:
            return self.device_mesh["dp_shard"]
        return self.device_mesh["dp_replicate", "dp_shard"]

    @property
    def data_parallel_rank(self) -> int:
        """Which slice of a global batch this process reads (all tensor-parallel ranks read the same one)."""
        replica = self.device_mesh.get_local_rank("dp_replicate")
        return replica * self._size("dp_shard") + self.device_mesh.get_local_rank("dp_shard")

    @property
    def data_parallel_size(self) -> int:
        """Number of slices of a global batch."""
        return self._size("dp_replicate") * self._size("dp_shard")

    @property
    def data_groups(self) -> list[dist.ProcessGroup]:
        """Summing over each of these groups in turn sums over all slices of a global batch."""
        return self._groups("dp_shard", "dp_replicate")

    @property
    def shard_groups(self) -> list[dist.ProcessGroup]:
        """Summing over each of these groups in turn sums over all distinct pieces of the model (not over replicas)."""
        return self._groups("dp_shard", "tp")

    @property
    def layout(self) -> Layout:
        """Where this process's pieces of the global tensors lie."""
        return Layout.from_mesh(self.device_mesh)

    def _size(self, name: str) -> int:
        return self.device_mesh[name].size()

    def _groups(self, *names: str) -> list[dist.ProcessGroup]:
        return [self.device_mesh.get_group(name) for name in names if self._size(name) > 1]


def build_mesh(config: ParallelConfig, *, world_size: int, device_type: str) -> Mesh | None:
    """The grid of all processes, None when there is one. Collective; `torch.distributed` must be initialized.

    device_type: "cpu" (gloo) or "cuda" (NCCL). Raises ValueError when the degrees do not fit the world size.
    """
    degrees = config.degrees(world_size)
    if world_size == 1:
        return None
    return Mesh(init_device_mesh(device_type, degrees, mesh_dim_names=("dp_replicate", "dp_shard", "tp")))
