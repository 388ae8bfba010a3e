"""A batch is cut into slices of equal work, and a length that does not divide is refused with one that does."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.models.decoder import Decoder
from megatron_lite.models.rope import restarting_positions
from megatron_lite.parallel.mesh import CPU, Degrees, Mesh, ParallelConfig
from megatron_lite.parallel.sequence_length import check_layout
from megatron_lite.parallel.sequence_slices import ContextParallel, check_numbering, cut, shard_sequence
from tests.engine import harness
from tests.engine.harness import Case
from tests.engine.test_hybrid import HYBRID


def places(cp: int) -> list[ContextParallel]:
    return [ContextParallel(rank, cp, None) for rank in range(cp)]


@given(cp=st.integers(1, 6), length=st.integers(1, 5))
def test_every_token_is_on_one_rank_and_all_have_the_same_work(cp: int, length: int) -> None:
    index_T = torch.arange(2 * cp * length)
    held = [cut(index_T, place, dim=0) for place in places(cp)]
    assert torch.cat(held).sort().values.equal(index_T)
    assert len({(part + 1).sum().item() for part in held}) == 1  # a causal query at t sees t + 1 keys
    for place, part in zip(places(cp), held):
        first, second = part.chunk(2)
        assert (first[0] // length, second[0] // length) == place.slices
        assert first.diff().eq(1).all()
        assert second.diff().eq(1).all()
    with pytest.raises(ValueError, match=f"parallel.cp={cp + 1}"):
        cut(torch.zeros(2, 2 * cp + 1), ContextParallel(0, cp + 1, None))


@given(st.data())
@settings(max_examples=30)
def test_positions_and_documents_are_those_of_the_whole_sequence(data: st.DataObject) -> None:
    """Also of documents of one token, and with borders on and beside those of slices."""
    cp = data.draw(st.sampled_from([2, 3, 4]))
    length = 2 * cp * data.draw(st.integers(1, 3))
    begins = torch.tensor([[0, *data.draw(st.lists(st.integers(0, 1), min_size=length - 1, max_size=length - 1))]] * 2)
    begins[1] = begins[1].flip(0)
    documents_BT = begins.cumsum(1) + 5
    tokens_BT = torch.arange(2 * length).view(2, length)
    batch = {"tokens": tokens_BT, "targets": tokens_BT + 1, "loss_mask": begins.bool(), "documents": documents_BT}
    decoder = Decoder(harness.run_config(Case(model={"num_layers": 1, "meta_tokens": 3})).model)
    whole = decoder.context(tokens_BT, documents_BT)
    numbered = F.pad(torch.arange(length) - restarting_positions(documents_BT), (3, 0))  # by their first token
    for place in places(cp):
        part = shard_sequence(batch, place)
        for key in ("tokens", "targets", "loss_mask"):
            assert part[key].equal(cut(batch[key], place)), key
        context = decoder.context(part["tokens"], part["documents"], positions_BT=part["positions"])
        assert context.prefix == whole.prefix == 3
        for got, wanted in ((context.positions_BT, whole.positions_BT), (context.documents_BT, numbered)):
            assert got[:, :3].equal(wanted[:, :3])
            assert got[:, 3:].equal(cut(wanted[:, 3:], place))
        alone = shard_sequence({"tokens": tokens_BT}, place)
        assert decoder.context(alone["tokens"], positions_BT=alone["positions"]).positions_BT.equal(
            torch.cat([torch.arange(3), 3 + cut(torch.arange(length), place, dim=0)])[None]
        )


def test_documents_numbered_in_another_way_are_refused() -> None:
    documents_BT = torch.tensor([0] * 2 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 2).expand(
        2, -1
    )  # one begins in every slice
    for place in places(2):
        numbered = shard_sequence({"tokens": documents_BT, "documents": documents_BT}, place)["documents"]
        check_numbering(F.pad(numbered, (3, 0)), place, prefix=3)
        for wrong in (cut(documents_BT, place), cut(documents_BT, place) * 16, numbered + 1, numbered - 1):
            with pytest.raises(RuntimeError, match=r"shard_sequence"):
                check_numbering(wrong, place, prefix=0)


def test_one_place_moves_and_cuts() -> None:
    batch = {"tokens": torch.arange(8)[None]}
    assert Mesh().place(batch)["tokens"] is batch["tokens"]
    assert Mesh(Degrees(), CPU).place(batch).keys() == batch.keys()


@pytest.mark.parametrize(
    ("changes", "layout", "seq_len", "says"),
    [
        ({}, {"cp": 4}, 60, r"data\.seq_len=60 with parallel\.cp=4 does not divide into 8 slices.*parallel\.cp=2"),
        ({"mamba.conv": 8}, {"cp": 4}, 48, r"slices of 6 tokens, fewer than the 7 .*model\.mamba\.conv=8"),
        ({"meta_tokens": 2}, {"cp": 2, "tp": 4, "sequence_parallel": True}, 64, r"model\.meta_tokens=2 make 34 tokens on a rank"),
        ({"meta_tokens": 3}, {"cp": 2, "tp": 2, "sequence_parallel": True}, 64, r"parallel\.sequence_parallel=false"),
        ({}, {"tp": 4, "sequence_parallel": True}, 62, r"data\.seq_len=62 does not divide by parallel\.tp=4"),
    ],
)  # fmt: skip
def test_a_length_that_does_not_divide_is_refused_with_one_that_does(
    changes: dict[str, object], layout: dict[str, int], seq_len: int, says: str
) -> None:
    model = harness.run_config(Case(model=HYBRID | {"max_seq_len": 256} | changes)).model
    parallel = ParallelConfig(**layout)
    with pytest.raises(ValueError, match=says):
        check_layout(model, parallel, seq_len=seq_len)


@given(st.data())
@settings(max_examples=60)
def test_every_way_out_is_one(data: st.DataObject) -> None:
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    changes = {"meta_tokens": pick(0, 1, 2, 3), "mamba.conv": pick(2, 4, 9), "max_seq_len": pick(40, 256)}
    model = harness.run_config(Case(model=HYBRID | changes)).model
    parallel = ParallelConfig(tp=pick(2, 4), cp=pick(1, 2, 3, 4, 6), sequence_parallel=pick(True, False))
    length = data.draw(st.integers(1, 40))
    message = ""
    try:
        check_layout(model, parallel, seq_len=length)
    except ValueError as error:
        message = str(error)
    if message.startswith("data.seq_len"):
        ways = message.partition("; choose ")[2].split(", or ")
        assert all(ways), message
        for way in ways:
            lengths = re.findall(r"\d+", way) if way.startswith("data.seq_len") else [length]
            changed = {key: json.loads(value) for key, value in re.findall(r"parallel\.(\w+)=(\w+)", way)}
            for seq_len in lengths:
                check_layout(model, replace(parallel, **changed), seq_len=int(seq_len))
