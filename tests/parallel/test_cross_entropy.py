"""`cross_entropy_sum` against float64 `F.cross_entropy` on whole logits, plain and over a sharded vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.parallel.chunked_loss import VocabularyShard, chunk_size
from megatron_lite.parallel.cross_entropy import cross_entropy_sum
from tests.distributed import run_ranks

UPSTREAM = 0.37  # what arrives from above in backward: the loss is divided by a token count there


def inputs(tokens: int, *, width: int = 12, rows: int = 24, vocab: int = 21, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    mask = torch.rand(tokens, generator=generator) > 0.3
    return x, weight, targets.masked_fill(~mask, -100), mask


def reference(x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, *, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, d x, d weight of UPSTREAM * loss: float64, whole logits, torch's own autograd."""
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = (x64 @ weight64.t())[:, :vocab]
    loss = F.cross_entropy(logits[mask], targets[mask], reduction="sum")
    (UPSTREAM * loss).backward()
    assert x64.grad is not None
    assert weight64.grad is not None
    return loss.detach(), x64.grad, weight64.grad


def assert_near(actual: Tensor, expected: Tensor, relative: float) -> None:
    """Within `relative` of the largest entry."""
    assert (actual.double() - expected).abs().max() <= relative * expected.abs().max().clamp(min=1e-30)


@settings(max_examples=40)
@given(tokens=st.integers(1, 40), chunk=st.integers(1, 50), pad=st.integers(0, 5))
def test_agrees_with_float64(tokens: int, chunk: int, pad: int) -> None:
    vocab = 24 - pad
    x, weight, targets, mask = inputs(tokens, vocab=vocab)
    loss = cross_entropy_sum(x, weight, targets, mask, shard=VocabularyShard(vocab), chunk_tokens=chunk)
    (UPSTREAM * loss).backward()
    expected, d_x, d_weight = reference(x, weight, targets, mask, vocab=vocab)
    # fp32 arithmetic on sums of at most 40 terms: a few units in the last place (6e-8 each).
    assert_near(loss.detach(), expected, 2e-6)
    assert_near(x.grad, d_x, 2e-6)
    assert_near(weight.grad, d_weight, 2e-6)
    assert torch.equal(x.grad[~mask], torch.zeros_like(x.grad[~mask]))
    assert torch.equal(weight.grad[vocab:], torch.zeros_like(weight.grad[vocab:]))


def test_derivative_by_finite_differences() -> None:
    x, weight, targets, mask = inputs(7, dtype=torch.float64)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy_sum(x, weight, targets, mask, shard=VocabularyShard(21), chunk_tokens=3)

    assert torch.autograd.gradcheck(loss, (x, weight))


def test_large_logits_do_not_overflow() -> None:
    x, weight, targets, mask = inputs(9)
    with torch.no_grad():
        x.mul_(1e3)
    loss = cross_entropy_sum(x, weight, targets, mask, shard=VocabularyShard(21))
    assert_near(loss.detach(), reference(x, weight, targets, mask, vocab=21)[0], 2e-6)


def test_no_token_counts() -> None:
    x, weight, targets, mask = inputs(5)
    loss = cross_entropy_sum(x, weight, targets, torch.zeros_like(mask), shard=VocabularyShard(21))
    loss.backward()
    assert loss.item() == 0.0
    assert not x.grad.any()
    assert not weight.grad.any()


def test_bf16_gradient_is_added_up_in_fp32() -> None:
    tokens = 2048
    x, weight, targets, mask = inputs(tokens, dtype=torch.bfloat16)
    loss = cross_entropy_sum(x, weight, targets, mask, shard=VocabularyShard(21), chunk_tokens=16)
    (UPSTREAM * loss).backward()
    expected, d_x, d_weight = reference(x, weight, targets, mask, vocab=21)
    assert loss.dtype is torch.float32
    assert x.grad.dtype is weight.grad.dtype is torch.bfloat16
    assert_near(loss, expected, 1e-3)  # bf16 logits err by up to 2^-9 = 2e-3 each, with both signs
    assert_near(x.grad, d_x, 2e-2)  # softmax of such logits, rounded to bf16 (2^-9) and multiplied in bf16
    # 128 chunks added up in bf16 would stop growing near 2^8 steps of the last place and miss by 5e-2 and more.
    assert_near(weight.grad, d_weight, 1e-2)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("with_gradient", [True, False])
def test_whole_logits_never_stand_in_memory(with_gradient: bool) -> None:
    tokens, rows, width, chunk = 256, 512, 8, 16
    x, weight, targets, mask = inputs(tokens, width=width, rows=rows, vocab=500)
    with LargestTensor() as seen, torch.set_grad_enabled(with_gradient):
        loss = cross_entropy_sum(x, weight, targets, mask, shard=VocabularyShard(500), chunk_tokens=chunk)
        if with_gradient:
            loss.backward()
    assert seen.elements == max(chunk * rows, rows * width if with_gradient else 0, tokens * width)


def test_chunks_follow_the_memory() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert chunk_size(local_vocab=8192, device=cpu) == 256
    assert chunk_size(local_vocab=256_000, device=cpu) == 128
    assert chunk_size(local_vocab=32_000, device=gpu) * 32_000 * 4 <= 512 * 2**20


def test_shapes_that_do_not_fit_are_named() -> None:
    x, weight, targets, mask = inputs(6)
    with pytest.raises(ValueError, match=r"hidden states \(6, 12\).*mask \(5,\)"):
        cross_entropy_sum(x, weight, targets, mask[:5], shard=VocabularyShard(21))


def sharded_loss(rank: int, world_size: int, vocab: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """The loss, the summed gradient of x, this rank's gradient of the weight, and the largest tensor sent."""
    x, weight, targets, mask = inputs(33, vocab=vocab)
    rows = weight.shape[0] // world_size
    local = weight.detach()[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def counting(tensor: Tensor, *args: object, **kwargs: object) -> object:
        sent.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        loss = cross_entropy_sum(
            x,
            local,
            targets,
            mask,
            shard=VocabularyShard(vocab, rank * rows, dist.group.WORLD),
            chunk_tokens=8,
        )
        (UPSTREAM * loss).backward()
    finally:
        dist.all_reduce = all_reduce
    dist.all_reduce(x.grad)
    return loss.detach(), x.grad, local.grad, max(sent)


@pytest.mark.parametrize(("ranks", "vocab"), [(2, 24), (4, 21), (4, 13)])  # 13: one rank holds nothing but padding
def test_sharded_vocabulary(ranks: int, vocab: int) -> None:
    results = run_ranks(ranks, sharded_loss, vocab)
    x, weight, targets, mask = inputs(33, vocab=vocab)
    expected, d_x, d_weight = reference(x, weight, targets, mask, vocab=vocab)
    for loss, d_x_sum, _, sent in results:
        assert torch.equal(loss, results[0][0])
        assert_near(loss, expected, 2e-6)
        assert_near(d_x_sum, d_x, 2e-6)
        assert sent <= 2 * 8  # two numbers a token of the chunk, not 24 logits
    assert_near(torch.cat([d_local for _, _, d_local, _ in results]), d_weight, 2e-6)
