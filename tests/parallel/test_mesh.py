"""Degrees and places in the grid of processes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.parallel.mesh import ParallelConfig, build_mesh
from tests.distributed import run_ranks


@given(replicate=st.integers(1, 6), shard=st.integers(1, 6), tp=st.integers(1, 8))
def test_the_data_parallel_degree_is_derived(replicate: int, shard: int, tp: int) -> None:
    world = replicate * shard * tp
    assert ParallelConfig(tp=tp, dp_replicate=replicate).degrees(world) == (replicate, shard, tp)
    assert ParallelConfig(tp=tp, dp_replicate=replicate, dp_shard=shard).degrees(world) == (replicate, shard, tp)


@pytest.mark.parametrize(
    ("config", "world", "message"),
    [
        (
            ParallelConfig(tp=2, dp_shard=4),
            6,
            r"dp_replicate\(1\) x dp_shard\(4\) x tp\(2\) = 8 != world size 6.*dp_shard=3 .*start 8 processes",
        ),
        (ParallelConfig(tp=4), 6, r"tp\(4\) = 4 does not divide the world size 6.*parallel.tp=3 would work"),
        (ParallelConfig(tp=2, dp_replicate=2), 6, r"2\) x tp\(2\) = 4 does not divide.*parallel.tp=1 would work"),
        (ParallelConfig(tp=2, dp_replicate=4), 6, r"parallel.dp_replicate=3 would work"),
        (ParallelConfig(tp=16), 8, r"parallel.tp=8 would work"),
        (ParallelConfig(tp=4, dp_replicate=4), 6, r"parallel.tp=3 with parallel.dp_replicate=1 would work"),
        (ParallelConfig(tp=0), 4, r"parallel.tp=0 must be at least 1"),
        (ParallelConfig(recompute="some"), 1, r"parallel.recompute=some is unknown.*none, selective, full"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(config: ParallelConfig, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.validate(world)


def test_one_process_has_no_mesh() -> None:
    assert build_mesh(ParallelConfig(), world_size=1, device_type="cpu") is None


def places(rank: int, world_size: int, config: ParallelConfig) -> dict[str, object]:
    import torch
    import torch.distributed as dist

    mesh = build_mesh(config, world_size=world_size, device_type="cpu")
    assert mesh is not None
    value = torch.tensor([10**rank])
    for group in mesh.data_groups:
        dist.all_reduce(value, group=group)
    layout = mesh.layout
    return {
        "tp": (mesh.tp_rank, mesh.tp_size),
        "data": (mesh.data_parallel_rank, mesh.data_parallel_size),
        "fsdp": mesh.data_parallel.mesh_dim_names,
        "tp_ranks": dist.get_process_group_ranks(mesh.tp_group),
        "summed over": value.item(),
        "layout": (layout.dp_rank, layout.dp_size, layout.tp_rank, layout.tp_size),
        "pieces": [dist.get_process_group_ranks(group) for group in mesh.shard_groups],
    }


def test_places_tensor_parallel_ranks_are_neighbors() -> None:
    results = run_ranks(4, places, ParallelConfig(tp=2))
    assert [r["tp"] for r in results] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [r["data"] for r in results] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [r["tp_ranks"] for r in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [r["summed over"] for r in results] == [101, 1010, 101, 1010]
    assert [r["layout"] for r in results] == [(0, 2, 0, 2), (0, 2, 1, 2), (1, 2, 0, 2), (1, 2, 1, 2)]
    assert results[0]["pieces"] == [[0, 2], [0, 1]]
    assert results[0]["fsdp"] == ("dp_shard",)


def test_places_replicas_are_outermost() -> None:
    results = run_ranks(4, places, ParallelConfig(dp_replicate=2))
    assert [r["data"] for r in results] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [r["summed over"] for r in results] == [1111] * 4
    assert [r["layout"] for r in results] == [(0, 2, 0, 1), (1, 2, 0, 1), (0, 2, 0, 1), (1, 2, 0, 1)]
    assert results[3]["pieces"] == [[2, 3]]
    assert results[0]["fsdp"] == ("dp_replicate", "dp_shard")
