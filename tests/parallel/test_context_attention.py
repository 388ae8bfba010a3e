"""Attention over a divided sequence against dense attention over the whole one, and what it sends, computes and keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.models.attention import AttentionCore
from megatron_lite.models.attention_mask import Visibility
from megatron_lite.models.cache import KeyValue
from megatron_lite.models.context import LayerContext
from megatron_lite.models.pattern import LayerSpec
from megatron_lite.models.rope import restarting_positions
from megatron_lite.parallel import context_tiles
from megatron_lite.parallel.context_attention import ContextParallelAttention
from megatron_lite.parallel.reclass import reclass
from megatron_lite.parallel.sequence_slices import ContextParallel, cut
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
    core.visibility = Visibility(case.window, case.always_visible)
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
    meta = torch.arange(case.prefix)[None]
    if documents is None:
        positions = torch.cat([meta, cut(case.prefix + torch.arange(length)[None], cp)], dim=1)
        return LayerContext(positions.to(device()), prefix=case.prefix)
    positions = torch.cat([meta.expand(2, -1), cut(case.prefix + restarting_positions(documents), cp)], dim=1)
    documents = cut(documents, cp)
    documents = torch.cat([documents[:, :1].expand(-1, case.prefix), documents], dim=1)
    return LayerContext(positions.to(device()), documents.to(device()), case.prefix)


def run_layer(case: Case, cp: ContextParallel, *, length: int, dtype: torch.dtype) -> list[Tensor]:
    """This rank's outputs and gradients, in float64; the gradients of meta tokens summed over the ranks."""
    query, key, value, grads = drawn(case, length, ranks=cp.size)
    grad = grads[0].clone()
    grad[:, :, : case.prefix] = grads[cp.rank, :, :, : case.prefix]
    query, key, value, grad = (of_rank(x, case, cp).to(device(), dtype) for x in (query, key, value, grad))
    for x in (query, key, value):
        x.requires_grad_()
    y = divided(case, cp).attend(query, KeyValue(key, value), local_context(case, length, cp))
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


@pytest.mark.parametrize("short_tiles", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_as_dense_attention(ranks: int, short_tiles: bool) -> None:
    for errors in run_ranks(ranks, largest_errors, torch.float64, short_tiles):
        assert {name: error for name, error in errors.items() if max(error) > 1e-12} == {}
