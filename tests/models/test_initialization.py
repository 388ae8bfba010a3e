"""Initial weights: the same on every layout, small in memory, of the right distribution."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.models import Decoder, initialization
from megatron_lite.models.initialization import (
    Constant,
    Normal,
    initialize_,
    initialize_model_,
    initialize_region_,
)


def whole(shape: tuple[int, ...], distribution=None, seed: int = 1, dtype=torch.float32) -> torch.Tensor:
    tensor = torch.full(shape, float("nan"), dtype=dtype)
    initialize_(tensor, distribution=distribution or Normal(0.5), name="w", seed=seed, global_shape=shape)
    return tensor


@st.composite
def boxes(draw):
    """A shape of 1 to 3 dims that spans a few blocks, and a box inside it (possibly empty)."""
    shape = tuple(draw(st.lists(st.integers(1, 37), min_size=1, max_size=3)))
    starts, sizes = [], []
    for n in shape:
        start = draw(st.integers(0, n))
        starts.append(start)
        sizes.append(draw(st.integers(0, n - start)))
    return shape, starts, sizes


@settings(max_examples=60)
@given(boxes(), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([None, 5, 20]))
def test_any_box_equals_the_slice_of_the_full_tensor(box, dtype, valid_rows):
    shape, starts, sizes = box
    distribution = Normal(0.5, valid_rows=valid_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initialization, "BLOCK_ELEMENTS", 64)  # many blocks in small tensors
        full = whole(shape, distribution, dtype=dtype)
        piece = torch.full(sizes, float("nan"), dtype=dtype)
        initialize_region_(piece, distribution=distribution, name="w", seed=1, global_shape=shape, starts=starts)
    cut = full
    for dim, (start, size) in enumerate(zip(starts, sizes)):
        cut = cut.narrow(dim, start, size)
    assert torch.equal(piece, cut)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_shards_of_a_real_block_size_put_together_are_the_full_tensor(dim, parts):
    shape = (413, 517)  # odd on purpose; 126 rows a block
    full = whole(shape)
    pieces, start = [], 0
    for chunk in torch.empty(shape).chunk(parts, dim=dim):
        piece = torch.full(chunk.shape, float("nan"))
        initialize_(piece, distribution=Normal(0.5), name="w", seed=1, global_shape=shape, dim=dim, start=start)
        pieces.append(piece)
        start += chunk.shape[dim]
    assert torch.equal(torch.cat(pieces, dim=dim), full)


def test_values_are_normal_and_differ_between_blocks_names_and_seeds():
    values = whole((1000, 300))
    assert values.mean().abs() < 5 * 0.5 / values.numel() ** 0.5  # five standard errors
    assert values.std() == pytest.approx(0.5, rel=0.01)  # 7 standard errors (1 / sqrt(2 n))
    kurtosis = (values / 0.5).pow(4).mean()
    assert kurtosis == pytest.approx(3.0, abs=0.1)  # 5 standard errors (sqrt(96 / n))
    block_rows = initialization.BLOCK_ELEMENTS // 300
    assert not torch.equal(values[:block_rows], values[block_rows : 2 * block_rows])
    assert not torch.equal(values, whole((1000, 300), seed=2))
    other = torch.empty(1000, 300)
    initialize_(other, distribution=Normal(0.5), name="v", seed=1, global_shape=(1000, 300))
    assert not torch.equal(values, other)


def test_more_rows_keep_the_rows_before():
    assert torch.equal(whole((500, 300))[:431], whole((431, 300)))


def test_a_piece_outside_the_parameter_is_refused():
    with pytest.raises(ValueError, match="w: a slice of shape"):
        initialize_(torch.empty(4, 3), distribution=Normal(1.0), name="w", seed=0, global_shape=(5, 3), start=2)


def test_constants_fill_and_respect_padding():
    assert torch.equal(whole((7,), Constant(2.0)), torch.full((7,), 2.0))
    assert whole((4, 2), Constant(2.0, valid_rows=3)).tolist() == [[2, 2], [2, 2], [2, 2], [0, 0]]


def poisoned(config) -> Decoder:
    model = Decoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialize_model_(model, seed=3)
    return model


def test_poisoned_model_is_whole_after_initialization(nemotron, llama):
    for config in (nemotron(linear_bias=True), llama(tie_embeddings=True)):
        model = poisoned(config)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        x = torch.randn(2, 3, config.hidden_size)
        gain_one = (x - x.mean(-1, keepdim=True)) if config.norm == "layernorm1p" else x
        expected = gain_one / (gain_one.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        # the fresh norm is the plain one (gain exactly 1); float32 rounding of values below 5
        torch.testing.assert_close(model.final_norm(x), expected, rtol=0, atol=5e-6)


def test_padding_rows_are_zero_and_padding_changes_no_other_value(nemotron):
    small, large = poisoned(nemotron(vocab_multiple=1)), poisoned(nemotron(vocab_multiple=64))
    assert large.embedding.weight.shape[0] == 128
    for weight, other in [
        (large.embedding.weight, small.embedding.weight),
        (large.head_weight, small.head_weight),
    ]:
        assert torch.equal(weight[:101], other)
        assert not weight[101:].any()
    assert torch.equal(large.layers[0].mixer.qkv.weight, small.layers[0].mixer.qkv.weight)


def test_scaled_output_init_scales_only_the_ways_back(nemotron):
    plain = poisoned(nemotron(num_layers=8))
    scaled = poisoned(replace(nemotron(num_layers=8), scaled_output_init=True))
    for name, parameter in plain.named_parameters():
        factor = 1 / 4 if name.endswith(("out.weight", "down.weight")) else 1  # sqrt(2 * 8) = 4
        assert torch.equal(scaled.get_parameter(name), parameter * factor), name


PEAK = """
import resource, sys, torch
from megatron_lite.models.initialization import Normal, initialize_
torch.set_num_threads(1)
def fill(shape, dim, start, rows):
    shard = torch.zeros(rows)
    initialize_(shard, distribution=Normal(0.02), name="w", seed=0, global_shape=shape, dim=dim, start=start)
torch.zeros(1000, 50).normal_(generator=torch.Generator())  # what torch itself needs the first time
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fill((4096, 16384), 0, 64, (128, 16384))  # 256 MiB in float32
fill((4096, 16384), 1, 64, (4096, 512))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_a_shard_never_needs_the_full_tensor():
    """Neither one of its first dimension nor one of its second."""
    result = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    # a shard has 8 MiB and a block 512 KiB; 32 MiB leave room for the allocator, an eighth of the tensor
    assert int(result.stdout) < 32, result.stdout
