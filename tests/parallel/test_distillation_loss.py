"""`distillation_sum` against whole logits in float64, plain and over a sharded vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lite.parallel.chunked_loss import VocabularyShard
from megatron_lite.parallel.distillation_loss import DistillationWeights, Projection, distillation_sum
from tests.distributed import run_ranks
from tests.parallel.test_cross_entropy import UPSTREAM, LargestTensor, assert_near

ROWS = 24


def inputs(tokens: int, *, vocab: int, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A student of width 12 and a teacher of width 20 over the same words."""
    draw = torch.Generator().manual_seed(tokens)
    sizes = {"x": (tokens, 12), "weight": (rows, 12), "teacher_x": (tokens, 20), "teacher_weight": (rows, 20)}
    made = {name: torch.randn(size, generator=draw).to(dtype) for name, size in sizes.items()}
    made["mask"] = torch.rand(tokens, generator=draw) > 0.3
    targets = torch.randint(0, vocab, (tokens,), generator=draw)
    return made | {"targets": targets.masked_fill(~made["mask"], -100)}


def sums(of: dict[str, Tensor], weights: DistillationWeights, shard: VocabularyShard, chunk: int | None = None):
    """The four sums, with gradients at `x` and `weight` from UPSTREAM times the first."""
    for name in ("x", "weight"):
        of[name] = of[name].detach().requires_grad_()
    result = distillation_sum(
        Projection(of["x"], of["weight"]),
        Projection(of["teacher_x"], of["teacher_weight"]),
        of["targets"],
        of["mask"],
        weights=weights,
        shard=shard,
        chunk_tokens=chunk,
    )
    (UPSTREAM * result.total).backward()
    return result


def reference(of: dict[str, Tensor], weights: DistillationWeights, vocab: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """The same in float64 from whole logits, with torch's own divergence and autograd: the formula of ModelOpt's
    `LogitsDistillationLoss` (kl_div of log-softmax at T, times T^2), summed over words and counted tokens."""
    x, weight = (of[name].detach().double().requires_grad_() for name in ("x", "weight"))
    mask, T = of["mask"], weights.temperature
    student = (x @ weight.t())[mask, :vocab]
    teacher = (of["teacher_x"].double() @ of["teacher_weight"].double().t())[mask, :vocab]
    divergence = F.kl_div(F.log_softmax(student / T, -1), F.softmax(teacher / T, -1), reduction="sum")
    ce, teacher_ce = (F.cross_entropy(logits, of["targets"][mask], reduction="sum") for logits in (student, teacher))
    total = T**2 * divergence + weights.cross_entropy * ce
    (UPSTREAM * total).backward()
    assert x.grad is not None
    assert weight.grad is not None
    return [t.detach() for t in (total, divergence, ce, teacher_ce)], x.grad, weight.grad


@settings(max_examples=40)
@given(
    tokens=st.integers(1, 40),
    chunk=st.integers(1, 50),
    pad=st.integers(0, 5),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    cross_entropy=st.sampled_from([0.0, 0.7]),
)
def test_agrees_with_float64(tokens: int, chunk: int, pad: int, temperature: float, cross_entropy: float) -> None:
    vocab, weights = ROWS - pad, DistillationWeights(temperature, cross_entropy)
    of = inputs(tokens, vocab=vocab)
    result = sums(of, weights, VocabularyShard(vocab), chunk)
    expected, d_x, d_weight = reference(of, weights, vocab)
    for got, wanted in zip(result, expected):
        assert_near(got.detach(), wanted, 4e-6)  # fp32: a few units of the last place (6e-8) of 40 terms and of T^2
    assert_near(of["x"].grad, d_x, 4e-6)
    assert_near(of["weight"].grad, d_weight, 4e-6)
    assert not of["weight"].grad[vocab:].any()
    assert not of["x"].grad[~of["mask"]].any()


def test_the_same_logits_have_no_divergence() -> None:
    of = inputs(9, vocab=21)
    of |= {"teacher_x": of["x"], "teacher_weight": of["weight"]}
    result = sums(of, DistillationWeights(2.0), VocabularyShard(21))
    assert result.kl.item() == 0.0
    assert not of["x"].grad.any()
    assert result.ce.item() == result.teacher_ce.item()


def test_large_logits_do_not_overflow() -> None:
    of = inputs(9, vocab=21)
    of |= {"x": of["x"] * 1e3, "teacher_x": of["teacher_x"] * 1e3}
    result = sums(of, DistillationWeights(), VocabularyShard(21))
    assert_near(result.total.detach(), reference(of, DistillationWeights(), 21)[0][0], 4e-6)


def test_a_student_that_is_not_finite_is_noticed() -> None:
    of = inputs(9, vocab=21)
    of["x"][of["mask"]] = torch.nan
    assert sums(of, DistillationWeights(), VocabularyShard(21)).total.isnan()


def test_bf16_is_summed_in_fp32() -> None:
    of = inputs(2048, vocab=21, dtype=torch.bfloat16)
    result = sums(of, DistillationWeights(), VocabularyShard(21), chunk=16)
    expected, d_x, d_weight = reference(of, DistillationWeights(), 21)
    assert result.total.dtype is torch.float32
    assert of["x"].grad.dtype is of["weight"].grad.dtype is torch.bfloat16
    assert_near(result.total.detach(), expected[0], 2e-3)  # bf16 logits of both err by up to 2^-9 = 2e-3 each
    assert_near(of["x"].grad, d_x, 2e-2)
    assert_near(of["weight"].grad, d_weight, 1e-2)


def test_neither_logits_are_ever_whole() -> None:
    tokens, rows, chunk = 256, 512, 16
    of = inputs(tokens, vocab=500, rows=rows)
    with LargestTensor() as seen:
        sums(of, DistillationWeights(2.0, 0.5), VocabularyShard(500), chunk)
    assert seen.elements == max(chunk * rows, rows * 20, tokens * 20)


def test_shapes_that_do_not_fit_are_named() -> None:
    of = inputs(6, vocab=21)
    with pytest.raises(ValueError, match=r"\(6, 6, 6, 5\)"):
        sums(of | {"mask": of["mask"][:5]}, DistillationWeights(), VocabularyShard(21))
    with pytest.raises(ValueError, match=r"output embeddings \[20, 24\]"):
        sums(of | {"teacher_weight": of["teacher_weight"][:20]}, DistillationWeights(), VocabularyShard(21))


def sharded(rank: int, world_size: int, vocab: int) -> tuple[list[Tensor], Tensor, Tensor, int]:
    """The four sums, the summed gradient of x, this rank's gradient of the weight, and the largest tensor sent."""
    of = inputs(33, vocab=vocab)
    rows = ROWS // world_size
    for name in ("weight", "teacher_weight"):
        of[name] = of[name][rank * rows : (rank + 1) * rows].clone()
    sent: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        all_reduce = dist.all_reduce
        patch.setattr(dist, "all_reduce", lambda t, *a, **k: (sent.append(t.numel()), all_reduce(t, *a, **k))[1])
        shard = VocabularyShard(vocab, rank * rows, dist.group.WORLD)
        result = sums(of, DistillationWeights(2.0, 0.5), shard, chunk=8)
    dist.all_reduce(of["x"].grad)
    return [value.detach() for value in result], of["x"].grad, of["weight"].grad, max(sent)


@pytest.mark.parametrize(("ranks", "vocab"), [(2, 24), (4, 13)])  # 13: one rank holds nothing but padding
def test_sharded_vocabulary(ranks: int, vocab: int) -> None:
    results = run_ranks(ranks, sharded, vocab)
    expected, d_x, d_weight = reference(inputs(33, vocab=vocab), DistillationWeights(2.0, 0.5), vocab)
    for values, d_x_sum, _, sent in results:
        assert values == results[0][0]
        for got, wanted in zip(values, expected):
            assert_near(got, wanted, 4e-6)
        assert_near(d_x_sum, d_x, 4e-6)
        assert sent <= 7 * 8  # seven numbers a token of the chunk
    assert_near(torch.cat([d_local for _, _, d_local, _ in results]), d_weight, 4e-6)
