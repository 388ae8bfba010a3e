"""Attention over a divided sequence against dense attention over the whole one, and what it sends, computes and keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.models.attention import Attention, AttentionCore
from megatron_lite.models.attention_mask import Visibility
from megatron_lite.models.cache import KeyValue
from megatron_lite.models.context import LayerContext
from megatron_lite.models.decoder import ResidualLayer
from megatron_lite.models.initialization import initialize_model_
from megatron_lite.models.norm import RMSNorm
from megatron_lite.models.pattern import LayerSpec
from megatron_lite.parallel import context_attention, context_tiles, context_window
from megatron_lite.parallel.context_attention import ContextParallelAttention
from megatron_lite.parallel.context_kernels import CpuFlash, CudaFlash, Efficient, Math, Part, PartKernel, attend
from megatron_lite.parallel.context_sequence import DividedSequence
from megatron_lite.parallel.context_tiles import META, Rule, Tile, View, routes, tiles, view
from megatron_lite.parallel.reclass import reclass
from megatron_lite.parallel.recompute import recompute_layer
from megatron_lite.parallel.sequence_slices import ContextParallel, cut, shard_sequence
from tests.distributed import device, run_ranks
from tests.model_configs import model_config

SLICE = 8


@dataclass(frozen=True)
class Case:
    """A layer and its sequences. lengths: of the documents, repeated until a row of T tokens is full; each row begins with another."""

    heads: int = 2
    groups: int = 2
    head_dim: int = 8
    value_head_dim: int = 8
    window: int | None = None
    always_visible: int = 0
    prefix: int = 0
    lengths: tuple[int, ...] = ()

    def documents(self, length: int) -> Tensor | None:
        """(2, T), numbered from 0."""
        if not self.lengths:
            return None
        rows = []
        for row in range(2):
            lengths = (self.lengths[row % len(self.lengths) :] + self.lengths) * length
            rows.append(torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)][: length + 1])[:length])
        return torch.stack(rows)


CASES = {
    "causal": Case(),
    "grouped": Case(heads=6, groups=2),
    "wide values": Case(heads=4, groups=2, head_dim=6, value_head_dim=10),
    "wide keys": Case(head_dim=10, value_head_dim=6),
    "documents on borders": Case(lengths=(SLICE,)),
    "documents one off": Case(lengths=(SLICE + 1, SLICE - 1, SLICE - 1, SLICE + 1)),
    "documents of one token": Case(heads=4, lengths=(1, 1, 1, 13, 1)),
    "one document": Case(lengths=(1000,), prefix=2),
    "short window": Case(window=3),
    "window of a slice": Case(window=SLICE),
    "long window": Case(window=2 * SLICE + 3, lengths=(17, 40)),
    "window, first tokens": Case(window=5, always_visible=4),
    "window, first tokens of documents": Case(window=5, always_visible=4, lengths=(17, 30, 1)),
    "meta tokens": Case(prefix=3, heads=4),
    "meta tokens, documents": Case(prefix=3, lengths=(5, 9, 1, 20)),
    "meta tokens, window": Case(prefix=3, always_visible=3, window=4, lengths=(5, 9, 1, 20)),
    "meta tokens that a window hides": Case(prefix=5, window=4, always_visible=2, lengths=(5, 9, 1, 20)),
    "more meta tokens than a window": Case(prefix=9, window=4, always_visible=2, lengths=(30, 5)),
    "everything": Case(6, 2, 6, 10, window=10, always_visible=6, prefix=3, lengths=(21, 2, 9)),
}


def divided(case: Case, cp: ContextParallel) -> AttentionCore:
    config = model_config(
        {
            "hidden_size": case.heads * case.head_dim,
            "attention.heads": case.heads,
            "attention.kv_heads": case.groups,
            "attention.head_dim": case.head_dim,
            "attention.value_head_dim": case.value_head_dim,
        }
    )
    core = AttentionCore(config, LayerSpec("*"))
    core.visibility, core.kv_window = Visibility(case.window, case.always_visible), case.window
    reclass(core, ContextParallelAttention, cp=cp)
    return core


def drawn(case: Case, length: int, *, ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, heads, prefix + T, ..), and the gradients of every rank's outputs (R, B, H, prefix + T, V): a token's
    gradient is its rank's, a meta token's the sum of all ranks'."""
    draw = torch.Generator().manual_seed(length)
    shapes = [(case.heads, case.head_dim), (case.groups, case.head_dim), (case.groups, case.value_head_dim)]
    tensors = [
        torch.randn(2, n, case.prefix + length, width, generator=draw, dtype=torch.float64) for n, width in shapes
    ]
    return *tensors, torch.randn(
        ranks, 2, case.heads, case.prefix + length, case.value_head_dim, generator=draw, dtype=torch.float64
    )


def dense_mask(case: Case, length: int) -> Tensor:
    """(2, S, S) bool, token by token."""
    documents = case.documents(length)
    rows = documents.tolist() if documents is not None else [[0] * length] * 2
    mask = torch.zeros(2, case.prefix + length, case.prefix + length, dtype=torch.bool)
    for row, numbers in enumerate(rows):
        of = [None] * case.prefix + numbers
        position = list(range(case.prefix))
        for i, number in enumerate(numbers):
            position.append(case.prefix if i and number != numbers[i - 1] else (position[-1] + 1 if i else case.prefix))
        for q in range(len(of)):
            for k in range(q + 1):
                near = case.window is None or position[q] - position[k] <= case.window
                mask[row, q, k] = of[k] in (None, of[q]) and (near or position[k] < case.always_visible)
    return mask


def dense(case: Case, length: int, *, ranks: int) -> tuple[Tensor, ...]:
    """Outputs and gradients of queries, keys and values of one process that has everything, in float64."""
    query, key, value, grads = drawn(case, length, ranks=ranks)
    for x in (query, key, value):
        x.requires_grad_()
    k, v = (x.repeat_interleave(case.heads // case.groups, dim=1) for x in (key, value))
    scores = (query @ k.mT / case.head_dim**0.5).masked_fill(~dense_mask(case, length)[:, None], -torch.inf)
    y = scores.softmax(-1) @ v
    grad = grads[0].clone()  # of a token: any rank's, if every rank is given the same one
    grad[:, :, : case.prefix] = grads[:, :, :, : case.prefix].sum(0)
    y.backward(grad)
    return y.detach(), query.grad, key.grad, value.grad


def of_rank(x: Tensor, case: Case, cp: ContextParallel) -> Tensor:
    """Meta tokens and the rank's slices of x (.., prefix + T, ..), tokens along dimension 2."""
    meta, tokens = x[:, :, : case.prefix], x[:, :, case.prefix :]
    return torch.cat([meta, cut(tokens, cp, dim=2)], dim=2)


def local_context(case: Case, length: int, cp: ContextParallel) -> LayerContext:
    documents = case.documents(length)
    batch = {"tokens": torch.zeros(2, length)} | ({} if documents is None else {"documents": documents})
    batch = shard_sequence(batch, cp)
    positions = torch.cat(
        [torch.arange(case.prefix)[None].expand(len(batch["positions"]), -1), case.prefix + batch["positions"]], dim=1
    )
    if documents is None:
        return LayerContext(positions.to(device()), prefix=case.prefix)
    begins = torch.cat([batch["documents"][:, :1].expand(-1, case.prefix), batch["documents"]], dim=1)
    return LayerContext(positions.to(device()), begins.to(device()), case.prefix)


def run_layer(case: Case, cp: ContextParallel, *, length: int, dtype: torch.dtype) -> list[Tensor]:
    """This rank's outputs and gradients, in float64; the gradients of meta tokens summed over the ranks.

    With a window, of two layers that share keys and values: the mean of both ways to get those of other ranks.
    """
    query, key, value, grads = drawn(case, length, ranks=cp.size)
    grad = grads[0].clone()
    grad[:, :, : case.prefix] = grads[cp.rank, :, :, : case.prefix]
    query, key, value, grad = (of_rank(x, case, cp).to(device(), dtype) for x in (query, key, value, grad))
    for x in (query, key, value):
        x.requires_grad_()
    core, kv, context = divided(case, cp), KeyValue(key, value), local_context(case, length, cp)
    y = core.attend(query, kv, context)
    if case.window is not None:
        y = (y + core.attend(query, core.shared(kv, context), context)) / 2
    y.backward(grad)
    found = [y.detach().double(), *(x.grad.double() for x in (query, key, value))]
    for x in found[1:]:
        meta = x[:, :, : case.prefix].contiguous()
        dist.all_reduce(meta)
        x[:, :, : case.prefix] = meta
    return found


@contextmanager
def tile_lengths(shortest: int, documents: int) -> Iterator[None]:
    before = context_tiles.SHORTEST_TILE, context_tiles.DOCUMENT_TILE
    context_tiles.SHORTEST_TILE, context_tiles.DOCUMENT_TILE = shortest, documents
    context_tiles.routes.cache_clear()
    try:
        yield
    finally:
        context_tiles.SHORTEST_TILE, context_tiles.DOCUMENT_TILE = before
        context_tiles.routes.cache_clear()


def largest_errors(rank: int, world_size: int, dtype: torch.dtype, short_tiles: bool) -> dict[str, list[float]]:
    """Of each case: the largest difference from dense attention of outputs, and of gradients of queries, keys and values, relative to
    the largest entry."""
    cp, length = ContextParallel(rank, world_size, dist.group.WORLD), 2 * world_size * SLICE
    errors = {}
    with tile_lengths(3, 3) if short_tiles else tile_lengths(64, 2048):
        for name, case in CASES.items():
            reference = [of_rank(x, case, cp) for x in dense(case, length, ranks=world_size)]
            found = run_layer(case, cp, length=length, dtype=dtype)
            errors[name] = [float((a.cpu() - b).abs().max() / b.abs().max()) for a, b in zip(found, reference)]
    return errors


@pytest.mark.parametrize(
    ("ranks", "short_tiles"),
    [
        (2, True),
        (4, False),
        *(pytest.param(*args, marks=pytest.mark.slow) for args in [(2, False), (3, False), (3, True), (4, True)]),
    ],
)
def test_as_dense_attention(ranks: int, short_tiles: bool) -> None:
    for errors in run_ranks(ranks, largest_errors, torch.float64, short_tiles):
        assert {name: error for name, error in errors.items() if max(error) > 1e-12} == {}


def test_in_bf16() -> None:
    """Inputs, the result of each pair of tiles and the gradients are rounded to 8 bits; sums are fp32."""
    for errors in run_ranks(2, largest_errors, torch.bfloat16, False):
        assert {name: error for name, error in errors.items() if max(error) > 2**-6} == {}


def bugs() -> dict[str, Any]:
    """What is planted: name -> a patch."""
    mask, reached = DividedSequence.mask, context_tiles._reached

    def off_by_one(self: Any, query: Tile, key: Tile, device: torch.device) -> Tensor:
        return mask(self, replace(query, first=query.first - 1), key, device)

    def one_less(key: Tile, query: int, rule: Rule) -> Tile | None:
        return reached(key, query + 1, rule)

    def dropped(grad_BGRX: Tensor, length: int, *_: Any) -> Tensor:
        return grad_BGRX.new_zeros(*grad_BGRX.shape[:2], length, grad_BGRX.shape[3])

    return {
        "gradients that come back are dropped": mock.patch.object(context_attention, "_add", lambda own, come: come and come.wait()),
        "a mask is one token off": mock.patch.object(DividedSequence, "mask", off_by_one),
        "gradients of what layers share are dropped": mock.patch.object(context_window, "window_backward", dropped),
        "the first token that a window reaches is not sent": mock.patch.object(context_tiles, "_reached", one_less),
    }  # fmt: skip


def planted(rank: int, world_size: int) -> dict[str, float]:
    cp, case, length = ContextParallel(rank, world_size, dist.group.WORLD), CASES["short window"], 4 * SLICE
    reference, found = [of_rank(x, case, cp) for x in dense(case, length, ranks=world_size)], {}
    for name, patch in bugs().items():
        with tile_lengths(3, 3), patch:
            got = run_layer(case, cp, length=length, dtype=torch.float64)
        found[name] = max(float((a.cpu() - b).abs().max()) for a, b in zip(got, reference))
    return found


def test_planted_bugs_are_found() -> None:
    ranks = run_ranks(2, planted)
    for name in bugs():
        assert max(found[name] for found in ranks) > 1e-3, name


def strides(rank: int, world_size: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """What the operators return, and what they say on the meta device that they do."""
    name, rule = dist.group.WORLD.group_name, [-1, 0, 0, 0]
    query, grad, kv = torch.randn(2, 8, 3, 4).transpose(1, 2), torch.randn(2, 3, 8, 4), torch.randn(2, 8, 1, 8)
    found = []
    for x in (query, query.contiguous()):
        here = x, kv.transpose(1, 2), None
        there = tuple(None if y is None else torch.empty_strided(y.shape, y.stride(), device="meta") for y in here)
        real, said = (context_attention.context_attention(*of, rule, name) for of in (here, there))
        gradients = context_attention.context_attention_backward
        real += gradients(grad, *here, *real, rule, name)
        said += gradients(grad.to("meta"), *there, *said, rule, name)
        found += [(a.stride(), b.stride()) for a, b in zip(real, said)]
    return found


def test_operators_say_what_they_return() -> None:
    """A compiled layer relies on it."""
    assert all(real == said for real, said in run_ranks(2, strides)[0])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.lengths])
def test_no_mask_where_none_is_needed(name: str) -> None:
    case = CASES[name]
    mask = dense_mask(case, 4 * SLICE)[0]
    rule = Rule(Visibility(case.window, case.always_visible), case.prefix, documents=False)
    numbers = [META, 0, 1, 2, 3] if case.prefix else [0, 1, 2, 3]
    with tile_lengths(3, 3):
        of_all = list(tiles(numbers, SLICE, rule))
    for query in of_all:
        for key in of_all:
            seen = mask[query.first : query.last + 1, key.first : key.last + 1]
            if not seen.any():
                expected = View.NOTHING
            elif query == key and torch.equal(seen, torch.ones_like(seen).tril()):
                expected = View.CAUSAL
            else:
                expected = View.ALL if seen.all() else View.SOME
            assert view(query, key, rule) is expected, (query, key)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.lengths])
def test_a_key_is_sent_to_those_who_see_it(name: str) -> None:
    """And no other is, but for tokens that share a tile with those that are always visible."""
    case = CASES[name]
    rule = Rule(Visibility(case.window, case.always_visible), case.prefix, documents=False)
    for size in (2, 3):
        mask = dense_mask(case, 2 * size * SLICE)[0]
        for rank in range(size):
            cp = ContextParallel(rank, size, None)
            own = {case.prefix + number * SLICE + i for number in cp.slices for i in range(SLICE)}
            seen = set(mask[sorted(own)].any(0).nonzero().flatten().tolist()) - own - set(range(case.prefix))
            received = [tile for route in routes(rank, size, SLICE, rule) for tile in route.received]
            sent = [place for tile in received for place in range(tile.first, tile.last + 1)]
            assert len(sent) == len(set(sent))
            assert seen == set(sent) if case.always_visible <= case.prefix else seen <= set(sent)


@pytest.mark.parametrize("size", [2, 4, 16])
def test_a_windows_work_is_balanced(size: int) -> None:
    """Within 10 % from eight windows a sequence on. With fewer it cannot be: the first window of the sequence sees less, and all of
    it is on the first rank (docs/long-context.md)."""
    for window, length in [(64, 512), (100, 2048), (1024, 8192), (1024, 32768)]:
        rule = Rule(Visibility(window, 4), prefix=4, documents=False)
        keys = list(tiles([META, *range(2 * size)], length // (2 * size), rule))
        scores = [0.0] * size
        for rank in range(size):
            for query in tiles(ContextParallel(rank, size, None).slices, length // (2 * size), rule):
                seen = {key: view(query, key, rule) for key in keys}
                share = {View.NOTHING: 0.0, View.CAUSAL: 0.5}
                scores[rank] += sum(query.length * key.length * share.get(how, 1.0) for key, how in seen.items())
        assert max(scores) <= 1.1 * sum(scores) / size, (window, length)


@pytest.mark.parametrize(
    ("kernel", "masked"),
    [(CudaFlash(), False), (Efficient(), False), (Efficient(), True), (Math(), True), (CpuFlash(), True)],
)
def test_every_kernel_takes_its_arguments(kernel: PartKernel, masked: bool) -> None:
    """On the meta device, which knows the operators of a GPU; what they compute only a GPU can say."""
    query, key, value = (
        torch.empty(2, n, t, w, dtype=torch.bfloat16, device="meta") for n, t, w in [(6, 9, 6), (2, 7, 6), (2, 7, 10)]
    )
    part = Part(query, key, value, mask=torch.empty(1, 1, 9, 7, dtype=torch.bool, device="meta") if masked else None)
    out, lse = kernel.forward(part)
    assert (out.shape, lse.shape) == ((2, 6, 9, 10), (2, 6, 9))
    grads = kernel.backward(part, out, out, lse)
    assert [x.shape for x in grads] == [x.shape for x in (query, key, value)]


def test_math_is_the_kernel_of_a_cpu() -> None:
    """Two ways to write one kernel; one of them is checked on ranks."""
    draw = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(2, n, t, w, generator=draw, dtype=torch.float64)
        for n, t, w in [(6, 9, 6), (2, 7, 6), (2, 7, 10), (6, 9, 10)]
    )
    part = Part(query, key, value, mask=torch.rand(2, 1, 9, 7, generator=draw) < 0.8)
    out, lse = attend(part)
    for kernel in (Math(), CpuFlash()):
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(kernel.forward(part), (out, lse)))
    for a, b in zip(*(kernel.backward(part, grad, out, lse) for kernel in (Math(), CpuFlash()))):
        assert torch.allclose(a, b, atol=1e-13)


# ---------------------------------------------------------------- counted

LONG = 8192
LAYER = {"hidden_size": 32, "attention.heads": 2, "attention.kv_heads": 1}  # 16 numbers a head


@dataclass
class Counts:
    """What a layer's forward and backward did on a rank.

    sent: numbers, in each exchange of forward and of backward. scores: of all kernel calls of forward, those with a mask among them.
    kept: bytes of the tensors kept for backward.
    """

    sent: tuple[list[int], list[int]]
    scores: float
    masked: float
    kept: int
    result: tuple[Tensor, Tensor]


def residual_layer(cp: ContextParallel | None, mode: str, spec: LayerSpec) -> ResidualLayer:
    layer = ResidualLayer(RMSNorm(32, 1e-5), Attention(model_config(LAYER), spec))
    initialize_model_(layer, 0)
    if cp is not None:
        reclass(layer.mixer.core, ContextParallelAttention, cp=cp)
    recompute_layer(layer, mode, divided=cp is not None)
    return layer


def counted(cp: ContextParallel | None, mode: str, length: int, window: int | None = None) -> Counts:
    """On the CPU in fp32, one row without documents."""
    layer = residual_layer(cp, mode, LayerSpec("*", window=window))
    x = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length)[None]
    if cp is not None:
        x, positions = cut(x, cp), cut(positions, cp)
    x.requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.profiler.profile(record_shapes=True) as forward,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        y, _ = layer(x, LayerContext(positions))
    with torch.profiler.profile(record_shapes=True) as backward:
        y.square().sum().backward()
    scores = masked = 0.0
    for call in forward.events():
        if call.name == "aten::_scaled_dot_product_flash_attention_for_cpu":
            query, key, _, _, _, mask, _ = call.input_shapes
            found = query[1] * query[2] * key[2] * (0.5 if call.concrete_inputs[4] else 1.0)
            scores, masked = scores + found, masked + found * bool(mask)
    sent = tuple(
        [math.prod(call.input_shapes[1]) for call in part.events() if call.name == "c10d::alltoall_base_"]
        for part in (forward, backward)
    )
    return Counts(sent, scores, masked, sum(kept.values()), (y.detach(), x.grad))


def count_on_ranks(rank: int, world_size: int, cases: list[tuple[str, int, int | None]]) -> list[dict[str, Any]]:
    cp = ContextParallel(rank, world_size, dist.group.WORLD)
    return [vars(counted(cp, *case)) for case in cases]


def exchanged_for_shared(rank: int, world_size: int, window: int) -> dict[str, tuple[list[int], Tensor]]:
    """What a rank sends in forward and backward of two layers with the same keys and values, and the gradient, by recompute mode."""
    cp, found = ContextParallel(rank, world_size, dist.group.WORLD), {}
    first = LayerSpec("*", window=window, kv_window=window, shares=True)
    for mode in ("none", "selective", "full"):
        layers = [residual_layer(cp, mode, spec) for spec in (first, LayerSpec("*", window=window, kv_from=0))]
        context = LayerContext(cut(torch.arange(1024)[None], cp))
        x = cut(torch.randn(1, 1024, 32, generator=torch.Generator().manual_seed(0)), cp).requires_grad_()
        with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
            y, kv = layers[0](x, context)
            y, _ = layers[1](y, replace(context, kv=kv))
            y.square().sum().backward()
        found[mode] = [call.args[1].numel() for call in exchange.call_args_list], x.grad
    return found


def test_what_a_window_reaches_is_sent_once() -> None:
    """For all layers that share keys and values: the end of one slice, and its gradients."""
    window = 20
    for found in run_ranks(2, exchanged_for_shared, window):
        for sent, grad in found.values():
            assert sent == [window * 32, window * 32]
            assert torch.equal(grad, found["none"][1])


def test_what_is_sent_computed_and_kept() -> None:
    window = 100
    cases = [
        ("none", LONG, None),
        *((mode, 512, None) for mode in ("none", "selective", "full")),
        ("none", 4096, window),
    ]
    ranks = [[Counts(**counts) for counts in rank] for rank in run_ranks(4, count_on_ranks, cases)]
    long, *modes, near = zip(*ranks)
    # Slices of one KV head, 16 + 16 numbers a token: in round i a rank gets one slice of one before it, both of one after it.
    slice_size = LONG // 8 * 32
    for rank, counts in enumerate(long):
        sent = [slice_size * (1 if (rank + i) % 4 > rank else 2) for i in (1, 2, 3)]
        back = [slice_size * (1 if (rank - i) % 4 < rank else 2) for i in (1, 2, 3)]
        assert counts.sent[0] == sent
        assert sorted(counts.sent[1]) == sorted(sent + back)  # once more, and the gradients of what came
        assert counts.masked == 0
    # 8 pairs of slices, two of which are half: the same on every rank, and together no more than causal attention has
    assert len({counts.scores for counts in long}) == 1
    assert sum(counts.scores for counts in long) == 2 * LONG**2 / 2
    whole = counted(None, "none", LONG)
    assert all(counts.kept <= 0.3 * whole.kept for counts in long)
    for rank, counts in enumerate(long):
        cp = ContextParallel(rank, 4, None)
        for found, reference in zip(counts.result, whole.result):
            assert torch.allclose(
                found, cut(reference, cp), atol=1e-5 * float(reference.abs().max())
            )  # fp32, other order
    for none, selective, full in zip(*modes):
        assert none.sent == selective.sent == full.sent
        for again in (selective, full):
            assert all(torch.equal(a, b) for a, b in zip(none.result, again.result))
    # A window reaches the end of the slice before: two exchanges in which every rank sends at most one window, whatever the length.
    for rank, counts in enumerate(near):
        assert counts.sent[0] == [window * 32 * n for n in ((0 if rank == 3 else 1), (0 if rank == 0 else 1))]
        assert counts.scores <= 2 * 2 * 512 * 2 * window  # of each query of 2 heads in 2 slices
