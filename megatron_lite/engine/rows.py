"""Rows of a tensor over the data-parallel ranks, for DeepSpeed, which only shards flat buffers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.engine.mpu import ModelParallelUnit
from megatron_lite.models.initialization import Distribution
from megatron_lite.parallel.assemble import Fill, Materialize
from megatron_lite.parallel.global_view import Piece, chunk_bounds


def own_rows(whole: Tensor, unit: ModelParallelUnit, rank: int | None = None) -> Tensor:
    """A data-parallel rank's rows of a tensor, this one's by default."""
    rank = unit.get_data_parallel_rank() if rank is None else rank
    start, end = chunk_bounds(whole.shape[0], unit.get_data_parallel_world_size(), rank)
    return whole[start:end]


def share_rows(whole: Tensor, unit: ModelParallelUnit) -> None:
    """Give every data-parallel rank the rows of `whole` that each other one holds. Exact: a sum would turn -0.0 into 0.0."""
    for rank in range(unit.get_data_parallel_world_size()):
        rows = own_rows(whole, unit, rank)
        if rows.numel():
            dist.broadcast(rows, group=unit.get_data_parallel_group(), group_src=rank)


def by_rows(materialize: Materialize, unit: ModelParallelUnit) -> Fill:
    """A fill of whole tensor-parallel shards, of which each data-parallel rank reads or draws its own rows only."""

    def fill_rows(name: str, shard: Piece, initial: Distribution) -> None:
        info, whole = materialize.shards[name], shard.tensor()
        rows = materialize.layout.piece(own_rows(whole, unit), info.global_shape, tp_dim=info.tp_dim)
        materialize.fill(name, rows, initial)
        share_rows(whole, unit)

    return fill_rows


def flat_part(whole: Tensor, length: int, index: int) -> Tensor:
    """Part `index` of the flattened tensor, cut into parts of `length`; the last ones are filled up with zeros."""
    part = whole.flatten()[index * length : (index + 1) * length]
    return torch.nn.functional.pad(part, (0, length - part.numel()))
