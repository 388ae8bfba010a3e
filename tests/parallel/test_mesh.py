"""Degrees and places in the grid of processes."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.parallel.global_view import Layout
from megatron_lite.parallel.mesh import CPU, Degrees, Mesh, ParallelConfig, build_mesh, group_timeout, sum_over
from tests.distributed import PATIENCE_SECONDS, run_ranks


@given(replicate=st.integers(1, 6), shard=st.integers(1, 6), cp=st.integers(1, 4), tp=st.integers(1, 8))
def test_the_data_parallel_degree_is_derived(replicate: int, shard: int, cp: int, tp: int) -> None:
    expected = Degrees(dp_replicate=replicate, dp_shard=shard, cp=cp, tp=tp)
    world = replicate * shard * cp * tp
    assert expected.world_size == world
    assert ParallelConfig(tp=tp, cp=cp, dp_replicate=replicate).degrees(world) == expected
    assert ParallelConfig(tp=tp, cp=cp, dp_replicate=replicate, dp_shard=shard).degrees(world) == expected


@given(replicate=st.integers(1, 5), cp=st.integers(1, 5), tp=st.integers(1, 5), world=st.integers(1, 24))
def test_the_way_out_works(replicate: int, cp: int, tp: int, world: int) -> None:
    config = ParallelConfig(tp=tp, cp=cp, dp_replicate=replicate)
    if world % (replicate * cp * tp) == 0:
        return
    with pytest.raises(ValueError, match="would work") as caught:
        config.degrees(world)
    named = dict(re.findall(r"parallel\.(\w+)=(\d+)", str(caught.value)))
    assert named
    assert replace(config, **{key: int(value) for key, value in named.items()}).degrees(world).world_size == world
    for key, value in named.items():  # what can be divided by the degree that was asked for can be divided by this one
        assert getattr(config, key) % int(value) == 0


def test_degrees_are_named() -> None:
    assert str(Degrees(dp_shard=2, cp=4, tp=8)) == "dp_shard 2 x cp 4 x tp 8"
    assert str(Degrees()) == "one process"


@pytest.mark.parametrize(
    ("config", "world", "message"),
    [
        (
            ParallelConfig(tp=2, dp_shard=4),
            6,
            r"dp_replicate\(1\) x dp_shard\(4\) x tp\(2\) = 8 != world size 6.*dp_shard=3 .*start 8 processes",
        ),
        (
            ParallelConfig(tp=4),
            6,
            r"tp\(4\) = 4 does not divide the world size 6.*parallel.tp=2 would work, or a multiple of 4",
        ),
        (ParallelConfig(tp=2, dp_replicate=2), 6, r"2\) x tp\(2\) = 4 does not divide.*parallel.tp=1 would work"),
        (ParallelConfig(tp=2, dp_replicate=6), 8, r"parallel.dp_replicate=2 would work"),
        (ParallelConfig(tp=8), 7, r"parallel.tp=1 would work"),
        (ParallelConfig(tp=16), 8, r"parallel.tp=8 would work"),
        (ParallelConfig(tp=4, dp_replicate=4), 6, r"parallel.tp=2 with parallel.dp_replicate=1 would work"),
        (ParallelConfig(pp=2), 4, r"parallel.pp=2: pipeline parallelism is not built yet; set parallel.pp=1"),
        (
            ParallelConfig(tp=2, cp=2, dp_shard=1),
            8,
            r"dp_replicate\(1\) x dp_shard\(1\) x cp\(2\) x tp\(2\) = 4.*dp_shard=2 .*start 4 processes",
        ),
        (ParallelConfig(cp=4), 2, r"cp\(4\) x tp\(1\) = 4 does not divide the world size 2.*parallel.cp=2 would work"),
        (ParallelConfig(cp=0), 4, r"parallel.cp=0 must be at least 1"),
        (ParallelConfig(tp=0), 4, r"parallel.tp=0 must be at least 1"),
        (ParallelConfig(recompute="some"), 1, r"parallel.recompute=some is unknown.*none, selective, full"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(config: ParallelConfig, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.validate(world)


def test_one_process_has_no_groups() -> None:
    mesh = build_mesh(ParallelConfig().degrees(1), device=CPU)
    assert mesh == Mesh()
    assert not dist.is_initialized()
    assert (mesh.loss_groups, mesh.world) == ([], [])
    assert (mesh.tp_rank, mesh.tp_size, mesh.data_parallel_rank, mesh.data_parallel_size, mesh.stage) == (0, 1, 0, 1, 0)
    assert mesh.layout == Layout()


def places(rank: int, world_size: int, degrees: Degrees) -> dict[str, object]:
    mesh = build_mesh(degrees, device=CPU)
    layout = mesh.layout
    return {
        "tp": (mesh.tp_rank, mesh.tp_size),
        "data": (mesh.data_parallel_rank, mesh.data_parallel_size),
        "stage": mesh.stage,
        "fsdp": mesh.sharding.mesh_dim_names,
        "tp_ranks": dist.get_process_group_ranks(mesh.group("tp")),
        "cp_ranks": dist.get_process_group_ranks(mesh.group("cp")) if degrees.cp > 1 else [rank],
        "cp": mesh.context_parallel and (mesh.cp_rank, mesh.cp_size, mesh.context_parallel.group.rank()),
        "summed over": sum_over(mesh.loss_groups, torch.tensor([10**rank])).item(),
        "layout": (layout.dp_rank, layout.dp_size, layout.tp_rank, layout.tp_size),
    }


def timeouts(rank: int, world_size: int, degrees: Degrees) -> set[float]:
    mesh = build_mesh(degrees, device=CPU)
    groups = [mesh.group(axis) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")]
    return {group_timeout(group, CPU).total_seconds() for group in [*mesh.world, *groups]}


def test_all_groups_wait_as_long_as_the_default_group() -> None:
    """The watchdog, which names a culprit, must be the first to end a job that hangs."""
    assert run_ranks(4, timeouts, Degrees(cp=2, tp=2)) == [{PATIENCE_SECONDS}] * 4


def test_places_tensor_parallel_ranks_are_neighbors() -> None:
    results = run_ranks(4, places, Degrees(dp_shard=2, tp=2))
    assert [r["tp"] for r in results] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [r["data"] for r in results] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [r["tp_ranks"] for r in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [r["summed over"] for r in results] == [101, 1010, 101, 1010]
    assert [r["layout"] for r in results] == [(0, 2, 0, 2), (0, 2, 1, 2), (1, 2, 0, 2), (1, 2, 1, 2)]
    assert results[0]["fsdp"] == ("dp_shard",)


def test_places_replicas_are_outermost() -> None:
    results = run_ranks(4, places, Degrees(dp_replicate=2, dp_shard=2))
    assert [r["data"] for r in results] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [r["summed over"] for r in results] == [1111] * 4
    assert [r["layout"] for r in results] == [(0, 2, 0, 1), (1, 2, 0, 1), (0, 2, 0, 1), (1, 2, 0, 1)]
    assert results[0]["fsdp"] == ("dp_replicate", "dp_shard")


def test_context_parallel_ranks_share_samples_and_shards() -> None:
    results = run_ranks(4, places, Degrees(dp_shard=2, cp=2))
    assert [r["data"] for r in results] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [r["summed over"] for r in results] == [1111] * 4
    assert [r["layout"] for r in results] == [(rank, 4, 0, 1) for rank in range(4)]
    assert [r["cp_ranks"] for r in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [r["cp"] for r in results] == [(0, 2, 0), (1, 2, 1), (0, 2, 0), (1, 2, 1)]
    assert results[0]["fsdp"] == ("dp_shard",)


def test_context_parallel_ranks_are_outside_tensor_parallel_ones() -> None:
    results = run_ranks(4, places, Degrees(cp=2, tp=2))
    assert [r["tp_ranks"] for r in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [r["cp_ranks"] for r in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [r["data"] for r in results] == [(0, 1)] * 4
    assert [r["summed over"] for r in results] == [101, 1010, 101, 1010]


def test_pipeline_stages_are_outermost() -> None:
    results = run_ranks(4, places, Degrees(pp=2, dp_shard=2))
    assert [r["stage"] for r in results] == [0, 0, 1, 1]
    assert [r["summed over"] for r in results] == [11, 11, 1100, 1100]
