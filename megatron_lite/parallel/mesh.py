"""The mesh of processes: pp x dp_replicate x dp_shard x cp x tp.

Notable features:
- Tensor parallelism is the innermost dimension: its ranks are neighbors, so it stays inside a node as long as tp is at
  most the number of GPUs there. cp and dp_shard come next, dp_replicate (HSDP, arXiv 2304.11277 section 3.2.2) is outside them.
- The cp ranks of a data-parallel rank read the same samples, and each computes its slices of their sequences. For everything else
  they are data-parallel ranks: dp_shard x cp processes shard the model, and losses and gradients are summed over them.
- The data-parallel degree is derived from the number of processes. Degrees that do not fit are refused, with a suggestion
  that does.
- One process is the mesh whose degrees are all 1: it has no groups and needs no process group.

rank = (((pp rank x dp_replicate + replica) x dp_shard + shard rank) x cp + cp rank) x tp + tp rank.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import timedelta
from math import gcd, prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_lite.parallel.global_view import Layout
from megatron_lite.parallel.sequence_slices import ContextParallel, shard_sequence

RECOMPUTE_MODES = ("none", "selective", "full")
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

    def __str__(self) -> str:
        """The degrees above 1, as in `dp_shard 2 x cp 4`."""
        return " x ".join(f"{key} {value}" for key, value in asdict(self).items() if value > 1) or "one process"


@dataclass
class ParallelConfig:
    """How one model and one batch are divided over the processes.

    tp: tensor-parallel degree, the processes that share one layer's matrices.
    dp_shard: processes over which the engine shards weights, gradients and optimizer state; None: all that are left.
    dp_replicate: copies of that sharded model (HSDP).
    sequence_parallel: norms and residual stream cut along the sequence over the tensor-parallel processes.
    recompute: activations recomputed in backward: none | selective (all but matrix products) | full (whole layers).
    compile: `torch.compile` for each layer.
    cp: context-parallel degree, the processes that divide each sequence.
    pp: pipeline-parallel degree; must be 1.
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
        if self.pp != 1:
            raise ValueError(f"parallel.pp={self.pp}: pipeline parallelism is not built yet; set parallel.pp=1")
        for key in ("tp", "cp", "dp_shard", "dp_replicate"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"parallel.{key}={value} must be at least 1")
        fixed = self.tp * self.cp * self.dp_replicate
        if world_size % fixed:
            raise ValueError(
                f"{self._product('dp_replicate', 'cp', 'tp')} = {fixed} does not divide the world size {world_size} (number of "
                f"processes); {self._way_out(world_size)} would work, or a multiple of {fixed} processes"
            )
        derived = world_size // fixed
        if self.dp_shard not in (None, derived):
            raise ValueError(
                f"{self._product('dp_replicate', 'dp_shard', 'cp', 'tp')} = "
                f"{fixed * self.dp_shard} != world size {world_size} (number of processes); set "
                f"parallel.dp_shard={derived} (or null to derive it), or start {fixed * self.dp_shard} processes"
            )
        return Degrees(dp_replicate=self.dp_replicate, dp_shard=derived, cp=self.cp, tp=self.tp)

    def _product(self, *keys: str) -> str:
        return " x ".join(f"{key}({getattr(self, key)})" for key in keys if key != "cp" or self.cp > 1)

    def _way_out(self, world_size: int) -> str:
        """What to set when dp_replicate x cp x tp does not divide the world size: one of them, or tp and the others to 1. A part of what
        was asked for, because a model that can be divided by 8 can be divided by 4, but perhaps not by 7."""
        degrees = {key: getattr(self, key) for key in ("tp", "cp", "dp_replicate")}
        for key, value in degrees.items():
            others = prod(degrees.values()) // value
            if value > 1 and world_size % others == 0:
                return f"parallel.{key}={gcd(value, world_size // others)}"
        ones = [f"parallel.{key}=1" for key in ("cp", "dp_replicate") if degrees[key] > 1]
        return f"parallel.tp={gcd(self.tp, world_size)} with {' and '.join(ones)}"


# dp_shard holds dp_shard x cp processes: they shard the model together, and with dp_replicate they share the loss.
_AXES = ("pp", "dp_replicate", "dp_shard", "tp")


@dataclass(frozen=True)
class Mesh:
    """This process's position in the mesh and its process groups.

    device: where this process's tensors are. device_mesh: the groups, over `_AXES`; None for one process.
    context_group: the processes that divide one sequence; None where cp is 1.
    """

    degrees: Degrees = Degrees()
    device: torch.device = CPU
    device_mesh: DeviceMesh | None = None
    context_group: dist.ProcessGroup | None = None

    @property
    def tp_rank(self) -> int:
        """Place among the processes that share a layer's matrices."""
        return self._rank("tp")

    @property
    def tp_size(self) -> int:
        """Number of processes that share a layer's matrices."""
        return self.degrees.tp

    @property
    def cp_rank(self) -> int:
        """Place among the processes that divide one sequence."""
        return self._rank("dp_shard") % self.degrees.cp

    @property
    def cp_size(self) -> int:
        """Number of processes that divide one sequence."""
        return self.degrees.cp

    @property
    def context_parallel(self) -> ContextParallel | None:
        """What layers that look along the sequence need to know; None where every process has whole sequences."""
        return None if self.cp_size == 1 else ContextParallel(self.cp_rank, self.cp_size, self.context_group)

    @property
    def stage(self) -> int:
        """Which stage of the pipeline this process computes."""
        return self._rank("pp")

    @property
    def data_parallel_rank(self) -> int:
        """Which slice of a global batch this process reads (all tensor-parallel and context-parallel ranks read the same one)."""
        return self._rank("dp_replicate") * self.degrees.dp_shard + self._rank("dp_shard") // self.degrees.cp

    @property
    def data_parallel_size(self) -> int:
        """Number of slices of a global batch."""
        return self.degrees.data_parallel

    @property
    def sharding(self) -> DeviceMesh:
        """What `fully_shard` takes: (dp_shard), or (dp_replicate, dp_shard) when there are replicas. cp is in dp_shard."""
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
        """Where this process's shards are in the global tensors."""
        return Layout.from_mesh(self.device_mesh)

    def place(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch of this data-parallel rank, entries (B, T), on the device; under context parallelism this process's slices of it.

        Raises ValueError if the sequences do not divide.
        """
        on_device = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        return on_device if self.context_parallel is None else shard_sequence(on_device, self.context_parallel)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The processes along one of the dimensions pp, dp_replicate, dp_shard (which has cp in it), cp, tp."""
        assert self.device_mesh is not None, "one process has no groups"
        if axis == "cp":
            assert self.context_group is not None, "parallel.cp is 1"
            return self.context_group
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
    device_mesh = init_device_mesh(device.type, sizes, mesh_dim_names=_AXES)
    mesh = Mesh(degrees, device, device_mesh, _context_group(degrees))
    timeout = group_timeout(mesh.world[0], device)
    contexts = [mesh.context_group] if mesh.context_group is not None else []
    for group in [*map(mesh.group, _AXES), *contexts]:  # torch gives them its own 30 minutes
        for kind in group._device_types:
            group._get_backend(kind)._set_default_timeout(timeout)
    return mesh


def _context_group(degrees: Degrees) -> dist.ProcessGroup | None:
    """The cp ranks among which this process divides sequences. It is not a dimension of the device mesh, whose groups then would
    have to be flattened again for sharding."""
    if degrees.cp == 1:
        return None
    ranks = torch.arange(degrees.world_size).view(-1, degrees.cp, degrees.tp).transpose(1, 2).flatten(0, 1)
    group, _ = dist.new_subgroups_by_enumeration(ranks.tolist())
    return group


def group_timeout(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """How long a collective of `group` on `device` waits for the other processes."""
    return group._get_backend(device).options._timeout


def sum_over(groups: list[dist.ProcessGroup], value: torch.Tensor) -> torch.Tensor:
    """The sum of `value` over each of the groups in turn, in place."""
    for group in groups:
        dist.all_reduce(value, group=group)
    return value
