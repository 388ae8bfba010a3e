"""Megatron's `mpu` (model parallel unit), from which DeepSpeed gets the tensor-parallel and the data-parallel group.

The names are DeepSpeed's. One process is the case of two groups of one.
"""

from __future__ import annotations

import torch.distributed as dist

from megatron_lite.parallel.mesh import Mesh


class ModelParallelUnit:
    """The tensor-parallel and the data-parallel group of this process. Needs an open process group."""

    def __init__(self, mesh: Mesh) -> None:
        world = dist.distributed_c10d._get_default_group()
        self.model = world if mesh.device_mesh is None else mesh.group("tp")
        self.data = world if mesh.device_mesh is None else mesh.group("dp_shard")

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The processes that share a layer's matrices."""
        return self.model

    def get_model_parallel_rank(self) -> int:
        """Place among them."""
        return dist.get_rank(self.model)

    def get_model_parallel_world_size(self) -> int:
        """Their number."""
        return dist.get_world_size(self.model)

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The processes that hold the same matrices and see other samples."""
        return self.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their global ranks."""
        return dist.get_process_group_ranks(self.data)

    def get_data_parallel_rank(self) -> int:
        """Place among them."""
        return dist.get_rank(self.data)

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return dist.get_world_size(self.data)
