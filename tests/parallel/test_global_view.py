"""Boxes against DTensor's own arithmetic and against counting."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from megatron_lite.parallel.global_view import Layout, Piece, cut_region, shard_index, shards_within


@given(
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=3).map(tuple),
    dp=st.integers(1, 5),
    tp=st.integers(1, 5),
    tp_dim=st.sampled_from([None, 0, 1]),
    dp_sharded=st.booleans(),
)
def test_boxes_are_dtensors(shape, dp, tp, tp_dim, dp_sharded):
    if tp_dim is not None and tp_dim >= len(shape):
        tp_dim = None
    sharded = _StridedShard(0, split_factor=tp) if tp_dim == 0 else Shard(0)
    along_dp = sharded if dp_sharded else Replicate()
    along_tp = Replicate() if tp_dim is None else Shard(tp_dim)
    if isinstance(along_dp, _StridedShard) and shape[0] % tp:
        # where tp does not divide the rows (19 rows, tp 2, dp 3), DTensor cuts elsewhere than FSDP2 cuts a local
        # parameter of a tensor-parallel module; the next test counts those boxes
        return
    for dp_rank, tp_rank in itertools.product(range(dp), range(tp)):
        sizes, offsets = _compute_local_shape_and_global_offset(
            shape, (dp, tp), (dp_rank, tp_rank), [along_dp, along_tp]
        )
        mine = Layout(dp_rank, dp, tp_rank, tp).box(shape, tp_dim=tp_dim, dp_sharded=dp_sharded)
        assert mine[1] == tuple(sizes)
        if 0 not in sizes:  # where an empty box begins means nothing
            assert mine[0] == tuple(offsets)


@given(
    shape=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    dp=st.integers(1, 4),
    tp=st.integers(1, 4),
    tp_dim=st.sampled_from([0, 1]),
)
def test_boxes_cover_every_number_once(shape, dp, tp, tp_dim):
    seen = torch.zeros(shape, dtype=torch.int64)
    for dp_rank, tp_rank in itertools.product(range(dp), range(tp)):
        (row, column), (rows, columns) = Layout(dp_rank, dp, tp_rank, tp).box(shape, tp_dim=tp_dim)
        seen[row : row + rows, column : column + columns] += 1
    assert seen.eq(1).all()


def test_a_wrong_local_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 2\) is not the shard \(4, 2\) of \(8, 2\)"):
        Layout(0, 2).piece(torch.zeros(3, 2), (8, 2))


def test_a_made_tensor_must_be_what_was_announced():
    piece = Layout(0, 2).piece(lambda: torch.zeros(3, 2), (8, 2), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"\(3, 2\) is not the shard \(4, 2\)"):
        piece.tensor()
    with pytest.raises(ValueError, match="bfloat16"):
        Piece(lambda: torch.zeros(3), (3,), dtype=torch.bfloat16).tensor()


@given(
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    parts=st.tuples(st.integers(1, 4), st.integers(1, 4), st.sampled_from([None, 0, 1])),
    data=st.data(),
)
def test_shards_within_a_slice_are_those_of_all_ranks_that_meet_it(shape, parts, data):
    dp, tp, tp_dim = parts
    if tp_dim is not None and tp_dim >= len(shape):
        tp_dim = None
    offsets = [data.draw(st.integers(0, length)) for length in shape]
    sizes = [data.draw(st.integers(0, length - start)) for length, start in zip(shape, offsets)]
    wanted = {}
    for dp_rank, tp_rank in itertools.product(range(dp), range(tp)):
        cuts = Layout(dp_rank, dp, tp_rank, tp).cuts(shape, tp_dim=tp_dim)
        begin, size = cut_region(shape, cuts)
        if all(max(a, b) < min(a + n, b + m) for a, n, b, m in zip(begin, size, offsets, sizes)):
            wanted[shard_index(cuts)] = begin, size
    plan = [(cut.dim, cut.parts) for cut in cuts]
    assert dict(shards_within(shape, plan, (tuple(offsets), tuple(sizes)))) == wanted


def test_a_rank_outside_is_refused():
    with pytest.raises(ValueError, match="tp_rank=2 is not one of tp_size=2"):
        Layout(tp_rank=2, tp_size=2)


def test_no_mesh_is_one_process():
    whole = torch.randn(3, 2)
    assert Layout.from_mesh(None).piece(whole, (3, 2), tp_dim=0) == Piece.whole(whole)
