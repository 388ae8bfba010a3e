"""Codes and scales against a numpy quantizer written apart (`oracle.py`), and those of Transformer Engine and torchao.

Numbers of all magnitudes, zeros, ties, sizes with incomplete blocks, bf16 and fp32. Codes and scales must be equal, not near.
"""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_lite.precision.formats import E4M3, E5M2, Format, Quantized, cast, product
from megatron_lite.precision.quantizers import BlockScaling, CurrentScaling, MXScaling, Pair, TileScaling
from tests.precision import oracle
from tests.transformer_engine_on_cpu import needs_wheel, transformer_engine_on_cpu

SHAPES = [(1, 1), (3, 32), (5, 300), (130, 257), (128, 128)]
DTYPES = [torch.float32, torch.bfloat16]
FORMATS = [E4M3, E5M2]


def drawn(shape: tuple[int, int], dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """Numbers over twelve magnitudes, a fifth of them 0, whole blocks of 0, and one row of tiny ones."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw) * 10.0 ** (12 * torch.rand(shape, generator=draw) - 8)
    x[torch.rand(shape, generator=draw) < 0.2] = 0.0
    x[: shape[0] // 2, shape[1] // 2 : shape[1] // 2 + 40] = 0.0
    x[-1] *= 1e-30
    return x.to(dtype)


def check(quantized: Quantized, x: Tensor, block: tuple[int, int] | None, scale_of_amax) -> None:
    """Codes, scales and values are those of the oracle."""
    form = {torch.float8_e4m3fn: "E4M3", torch.float8_e5m2: "E5M2"}[quantized.codes.dtype]
    codes, scales = oracle.quantized(x.float().numpy(), form, block, partial(scale_of_amax, form=form))
    np.testing.assert_array_equal(quantized.codes.double().numpy(), codes)
    if block != (1, 32):  # E8M0 writes 2^-127 for a block of zeros, which nothing is multiplied by
        np.testing.assert_array_equal(quantized.spread(quantized.scale_inv).expand(x.shape).numpy(), 1 / scales)
    np.testing.assert_allclose(quantized.values().numpy(), oracle.dequantized(codes, scales), rtol=1e-7)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_every_code_and_every_tie(form: Format) -> None:
    numbers = oracle.NUMBERS[form.name]
    assert numbers[-1] == form.largest
    between = (numbers[1:] + numbers[:-1]) / 2
    x = np.concatenate([numbers, between, np.nextafter(np.float32(between), np.float32(0)), [1e30, form.largest * 1.2]])
    x = np.concatenate([x, -x]).astype(np.float32)
    codes = cast(torch.from_numpy(x), torch.tensor(1.0), form)
    np.testing.assert_array_equal(codes.double().numpy(), oracle.rounded(x.astype(np.float64), form.name))
    assert torch.equal(codes.float().signbit(), torch.from_numpy(np.signbit(x)))


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_what_is_not_finite_stays_so(form: Format) -> None:
    """And what is finite does not become infinite, however large its scale."""
    x = torch.tensor([1.0, -torch.inf, torch.inf, torch.nan, 3e38])
    codes = cast(x, torch.tensor(2.0), form).float()
    assert codes.isfinite().tolist() == [True, False, False, False, True]
    assert codes[4] == form.largest
    for quantizer in (CurrentScaling(form), TileScaling(form), BlockScaling(form), MXScaling(form)):
        matrix = torch.ones(2, 300)
        matrix[0, 5] = torch.inf
        matrix[1, 290] = torch.nan
        for quantized, place in zip(quantizer.pair(matrix), [matrix, matrix.T]):
            values = quantized.values()
            assert not values[~place.isfinite()].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_numpy(shape: tuple[int, int], form: Format, dtype: torch.dtype) -> None:
    x = drawn(shape, dtype)
    for power_of_two in (False, True):
        scale = partial(oracle.scale_of, power_of_two=power_of_two, most=torch.finfo(dtype).max)
        for quantizer, block in (
            (CurrentScaling(form, power_of_two), None),
            (TileScaling(form, power_of_two), (1, 128)),
            (BlockScaling(form, power_of_two), (128, 128)),
        ):
            along_last, along_first = quantizer.pair(x)
            check(along_last, x, block, scale)
            check(along_first, x.T, block, scale)
    along_last, along_first = MXScaling(form).pair(x)
    check(along_last, x, (1, 32), oracle.mx_scale_of)
    check(along_first, x.T, (1, 32), oracle.mx_scale_of)


def test_how_many_different_tensors() -> None:
    """A transposed copy is made from the original numbers, but where one scale serves both ways of reading."""
    x = drawn((160, 192), torch.bfloat16)

    def shared(pair: Pair) -> bool:
        return torch.equal(pair[0].values(), pair[1].values().T)

    assert shared(CurrentScaling(E4M3).pair(x))
    assert shared(BlockScaling(E4M3).pair(x))
    for quantizer in (TileScaling(E4M3), MXScaling(E4M3)):
        along_last, along_first = quantizer.pair(x)
        assert not torch.equal(along_last.values(), along_first.values().T)
        # the planted bug: quantized from what was quantized before
        again = quantizer.pair(along_last.values())[1]
        assert not torch.equal(again.values(), along_first.values())


def test_products_sum_in_fp32() -> None:
    a, b = drawn((40, 300), torch.float32, seed=1).clamp(-9, 9), drawn((24, 300), torch.float32, seed=2).clamp(-9, 9)
    for quantizer in (CurrentScaling(E4M3), TileScaling(E4M3), MXScaling(E5M2)):
        one, other = quantizer.pair(a)[0], quantizer.pair(b)[0]
        wanted = one.values().double() @ other.values().double().T
        # 300 terms of fp32, each off by 2^-24 at most
        assert (product(one, other) - wanted).abs().max() < 300 * 2.0**-24 * wanted.abs().max()


@needs_wheel
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_current_scaling_is_transformer_engines_byte_for_byte(form: Format, power_of_two: bool) -> None:
    with transformer_engine_on_cpu():
        from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef

        theirs = CurrentScalingQuantizerRef(form.dtype, pow_2_scales=power_of_two)
        for x in [drawn(shape, dtype) for shape in SHAPES for dtype in DTYPES] + [torch.zeros(3, 5)]:
            wanted = theirs.quantize(x)
            for quantized, data, scale in zip(
                CurrentScaling(form, power_of_two).pair(x), (wanted.data, wanted.data_t), (wanted.scale, wanted.scale_t)
            ):
                assert torch.equal(quantized.codes.contiguous().view(torch.uint8), data.view(torch.uint8))
                assert quantized.scale_inv == scale


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_mx_is_torchaos_byte_for_byte(form: Format) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.prototype.mx_formats.mx_tensor import to_mx
    for dtype in DTYPES:
        x = drawn((96, 160), dtype)
        for quantized, of in zip(MXScaling(form).pair(x), (x, x.T.contiguous())):
            scale, data = to_mx(of, form.dtype, 32, ScaleCalculationMode.RCEIL)
            assert torch.equal(quantized.codes.view(torch.uint8), data.view(torch.uint8))
            assert torch.equal(quantized.scale_inv, scale.float().view_as(quantized.scale_inv))
