"""The mesh of processes: pp x dp_replicate x dp_shard x cp x tp.

Notable features:
- Tensor parallelism is the innermost dimension: its ranks are neighbors, so it stays inside a node as long as tp is at
  most the number of GPUs there. dp_shard comes next, dp_replicate (HSDP, arXiv 2304.11277 section 3.2.2) is outside it.
- The data-parallel degree is derived from the number of processes. Degrees that do not fit are refused, with a suggestion
  that does.
- One process is the mesh whose degrees are all 1: it has no groups and needs no process group.

rank = (((pp rank x dp_replicate + replica) x dp_shard + shard rank) x cp + cp rank) x tp + tp rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_lite.parallel.global_view import Layout

RECOMPUTE_MODES = ("none", "selective", "full")
NOT_BUILT = {"pp": "pipeline parallelism", "cp": "context parallelism"}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Degrees:
    """How many processes each kind of parallelism divides the work over; their product is the world size."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def data_parallel(self) -> int:
        """Number of slices of a global batch."""
        return self.dp_replicate * self.dp_shard


@dataclass
class ParallelConfig:
    """How one model and one batch are divided over the processes.

    tp: tensor-parallel degree, the processes that share one layer's matrices.
    dp_shard: processes over which the engine shards weights, gradients and optimizer state; None: all that are left.
    dp_replicate: copies of that sharded model (HSDP).
    sequence_parallel: norms and residual stream cut along the sequence over the tensor-parallel processes.
    recompute: activations recomputed in backward: none | selective (all but matrix products) | full (whole layers).
    compile: `torch.compile` for each layer.
    pp, cp: pipeline-parallel and context-parallel degree; must be 1.
    """

    tp: int = 1
    dp_shard: int | None = None
    dp_replicate: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    compile: bool = False
    pp: int = 1
    cp: int = 1

    def validate(self, world_size: int) -> None:
        """Raise ValueError naming the keys and a value that would work."""
        if self.recompute not in RECOMPUTE_MODES:
            raise ValueError(
                f"parallel.recompute={self.recompute} is unknown; choose one of {', '.join(RECOMPUTE_MODES)}"
            )
        self.degrees(world_size)

    def degrees(self, world_size: int) -> Degrees:
        """The degrees, with dp_shard derived where it is not given. Raises ValueError as `validate`."""
        for key, name in NOT_BUILT.items():
            if getattr(self, key) != 1:
                raise ValueError(f"parallel.{key}={getattr(self, key)}: {name} is not built yet; set parallel.{key}=1")
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
        return Degrees(dp_replicate=self.dp_replicate, dp_shard=derived, tp=self.tp)


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


# dp_shard holds dp_shard x cp processes: they shard the model together, and with dp_replicate they share the loss.
_AXES = ("pp", "dp_replicate", "dp_shard", "tp")


@dataclass(frozen=True)
class Mesh:
    """This process's position in the mesh and its process groups.

    device: where this process's tensors are. device_mesh: the groups, over `_AXES`; None for one process.
    """

    degrees: Degrees = Degrees()
    device: torch.device = CPU
    device_mesh: DeviceMesh | None = None

    @property
    def tp_rank(self) -> int:
        """Place among the processes that share a layer's matrices."""
        return self._rank("tp")

    @property
    def tp_size(self) -> int:
        """Number of processes that share a layer's matrices."""
        return self.degrees.tp

    @property
    def stage(self) -> int:
        """Which stage of the pipeline this process computes."""
        return self._rank("pp")

    @property
    def data_parallel_rank(self) -> int:
        """Which slice of a global batch this process reads (all tensor-parallel ranks read the same one)."""
        return self._rank("dp_replicate") * self.degrees.dp_shard + self._rank("dp_shard") // self.degrees.cp

    @property
    def data_parallel_size(self) -> int:
        """Number of slices of a global batch."""
        return self.degrees.data_parallel

    @property
    def sharding(self) -> DeviceMesh:
        """What `fully_shard` takes: (dp_shard), or (dp_replicate, dp_shard) when there are replicas."""
        assert self.device_mesh is not None, "one process shards nothing"
        if self.degrees.dp_replicate == 1:
            return self.device_mesh["dp_shard"]
        return self.device_mesh["dp_replicate", "dp_shard"]

    @property
    def loss_groups(self) -> list[dist.ProcessGroup]:
        """Summing over each of these groups in turn sums over all tokens of a global batch."""
        return self._groups("dp_shard", "dp_replicate")

    @property
    def world(self) -> list[dist.ProcessGroup]:
        """The one group of all processes; none for a single process."""
        return [] if self.device_mesh is None else [dist.distributed_c10d._get_default_group()]

    @property
    def layout(self) -> Layout:
        """Where this process's shards of the global tensors lie."""
        return Layout.from_mesh(self.device_mesh)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The processes along one of the dimensions pp, dp_replicate, dp_shard, tp."""
        assert self.device_mesh is not None, "one process has no groups"
        return self.device_mesh.get_group(axis)

    def _rank(self, axis: str) -> int:
        return 0 if self.device_mesh is None else self.device_mesh.get_local_rank(axis)

    def _groups(self, *axes: str) -> list[dist.ProcessGroup]:
        return [] if self.device_mesh is None else [self.group(a) for a in axes if self.device_mesh[a].size() > 1]


def build_mesh(degrees: Degrees, *, device: torch.device) -> Mesh:
    """The grid of all processes. Collective when there are several; `torch.distributed` must be initialized then.

    device: this process's; its type decides between gloo (cpu) and NCCL (cuda). Its groups wait as long as the default group.
    """
    if degrees.world_size == 1:
        return Mesh(degrees, device)
    sizes = (degrees.pp, degrees.dp_replicate, degrees.dp_shard * degrees.cp, degrees.tp)
    mesh = Mesh(degrees, device, init_device_mesh(device.type, sizes, mesh_dim_names=_AXES))
    timeout = group_timeout(mesh.world[0], device)
    for group in map(mesh.group, _AXES):  # torch gives them its own 30 minutes
        for kind in group._device_types:
            group._get_backend(kind)._set_default_timeout(timeout)
    return mesh


def group_timeout(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """How long a collective of `group` on `device` waits for the other processes."""
    return group._get_backend(device).options._timeout


def sum_over(groups: list[dist.ProcessGroup], value: torch.Tensor) -> torch.Tensor:
    """The sum of `value` over each of the groups in turn, in place."""
    for group in groups:
        dist.all_reduce(value, group=group)
    return value
