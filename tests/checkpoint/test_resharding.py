"""Saved at one layout, loaded at another, on real ranks: every number bitwise."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from megatron_lite.checkpoint import CheckpointConfig, CheckpointStore, Layout, load_tensors
from tests.checkpoint.processes import STATE, bitwise_equal, first_ranks
from tests.distributed import run_ranks

# (dp_replicate, dp_shard, tp) of n ranks; rank = (replica * dp_shard + dp) * tp + tp_rank
LAYOUTS = {
    n: [(r, d, n // r // d) for r in range(1, n + 1) for d in range(1, n + 1) if n % (r * d) == 0] for n in (1, 2, 3, 4)
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64]

# (shape, tp_dim, dp_sharded, dtype)
tensor = st.tuples(
    st.lists(st.integers(0, 7), max_size=3).map(tuple),
    st.sampled_from([None, 0, 1]),
    st.booleans(),
    st.sampled_from(DTYPES),
).map(lambda case: case if case[1] is None or case[1] < len(case[0]) else (case[0], None, *case[2:]))
layout = st.sampled_from([(n, place) for n, places in LAYOUTS.items() for place in places])


def global_tensors(cases: list[Any]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(cases))
    return {
        f"{('model', 'exp_avg')[i % 2]}.t{i}": torch.randn(shape, generator=generator).mul(1000).to(dtype)
        for i, (shape, _, _, dtype) in enumerate(cases)
    }


def cut(whole: torch.Tensor, dim: int, parts: int, index: int) -> torch.Tensor:
    """torch.chunk itself; it leaves trailing empty parts out."""
    chunks = whole.chunk(parts, dim)
    return chunks[index] if index < len(chunks) else whole.narrow(dim, whole.shape[dim], 0)


def local_tensors(
    rank: int, cases: list[Any], place: tuple[int, int, int]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(local tensors cut by torch.chunk, the pieces that describe them)."""
    replicas, dp, tp = place
    at = Layout((rank // tp) % dp, dp, rank % tp, tp, rank // tp // dp, replicas)
    local, pieces = {}, {}
    for (name, whole), (shape, tp_dim, dp_sharded, _) in zip(global_tensors(cases).items(), cases):
        part = whole if tp_dim is None else cut(whole, tp_dim, tp, at.tp_rank)
        if dp_sharded and shape:
            part = cut(part, 0, dp, at.dp_rank)
        local[name] = part
        pieces[name] = at.piece(part, shape, tp_dim=tp_dim, dp_sharded=dp_sharded)
    return local, pieces


def save_at(rank: int, size: int, folder: str, cases: list[Any], n: int, place: tuple[int, int, int]) -> None:
    group = first_ranks(n, size)
    if rank < n:
        store = CheckpointStore(folder, CheckpointConfig(), group=group)
        store.save(7, local_tensors(rank, cases, place)[1], STATE)


def load_at(rank: int, size: int, folder: str, cases: list[Any], n: int, place: tuple[int, int, int]) -> bool:
    group = first_ranks(n, size)
    if rank >= n:
        return True
    expected, pieces = local_tensors(rank, cases, place)
    target = {name: torch.full_like(part, -1) for name, part in expected.items()}
    store = CheckpointStore(folder, CheckpointConfig(), group=group)
    path = store.newest_valid()
    manifest = store.load(path, {name: piece.with_local(target[name]) for name, piece in pieces.items()})
    return manifest["consumed_samples"] == 640 and bitwise_equal(expected, target)


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(cases=st.lists(tensor, min_size=1, max_size=5), source=layout, target=layout)
def test_any_layout_loads_at_any_other(cases: Any, source: Any, target: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(4, save_at, folder, cases, *source)
        assert all(run_ranks(4, load_at, folder, cases, *target))
        assert bitwise_equal(dict(load_tensors(f"{folder}/step_00000007")), global_tensors(cases))


TRANSFORMER = [  # what a tiny model has: embedding, column, row, norm, an odd vector, a scalar
    ((10, 6), 0, True, torch.float32),
    ((12, 6), 0, True, torch.float32),
    ((6, 12), 1, True, torch.float32),
    ((6,), None, True, torch.bfloat16),
    ((5,), 0, True, torch.float32),
    ((), None, True, torch.float32),
    ((1, 3), None, True, torch.float32),
]


def test_dp2_tp2_and_hsdp_load_everywhere(tmp_path: Any) -> None:
    for number, source in enumerate([(1, 2, 2), (2, 2, 1), (2, 1, 2)]):
        folder = str(tmp_path / str(number))
        run_ranks(4, save_at, folder, TRANSFORMER, 4, source)
        for n, places in LAYOUTS.items():
            for place in places:
                assert all(run_ranks(4, load_at, folder, TRANSFORMER, n, place)), (source, n, place)


def shard_with_fsdp2(rank: int, size: int, n: int, shapes: list[tuple[int, ...]]) -> bool:
    """FSDP2's own local shards are the boxes of a layout."""
    mesh = init_device_mesh("cpu", (n,), mesh_dim_names=("dp_shard",))
    at = Layout.from_mesh(mesh)
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(shape)) for shape in shapes])
    whole = [parameter.detach().clone() for parameter in model]
    fully_shard(model, mesh=mesh)
    for parameter, full in zip(model.parameters(), whole):
        offsets, sizes = at.box(full.shape)
        expected = full[offsets[0] : offsets[0] + sizes[0]]
        if not at.piece(parameter.to_local().detach(), full.shape).local.equal(expected):
            return False
    return at == Layout(rank, n)


def test_a_layout_is_what_fsdp2_does() -> None:
    assert all(run_ranks(4, shard_with_fsdp2, 4, [(8, 3), (7, 2), (5,), (3, 4), (1,), (9,)]))


def place_in_a_mesh(rank: int, size: int) -> tuple[int, int, int, int]:
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    at = Layout.from_mesh(mesh)
    return at.dp_rank, at.dp_size, at.tp_rank, at.tp_size


def test_the_place_in_a_mesh() -> None:
    assert run_ranks(4, place_in_a_mesh) == [(0, 2, 0, 2), (0, 2, 1, 2), (1, 2, 0, 2), (1, 2, 1, 2)]
