"""Mamba-2's scan by flash-linear-attention's kernel against `ssd`, in bf16. Skips itself without CUDA or the package."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.models import ssd_kernel
from megatron_lite.models.scan import Operands, Past
from megatron_lite.models.ssd import ssd
from tests.models.test_ssd_kernel import inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("length", [64, 1000])
def test_the_kernel_is_ssd(length: int) -> None:
    pytest.importorskip("fla")
    x, dt, A, B, C, state = (value.detach().float().cuda() for value in inputs(length, 2))
    leaves = [leaf.requires_grad_() for leaf in (x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16(), state)]
    results = [function(Operands(*leaves[:5]), Past(leaves[5])) for function in (ssd_kernel.scan, ssd)]
    assert ssd_kernel.installed_kernel() is not None
    weights = [torch.randn_like(t) for t in results[1]]
    grads = [torch.autograd.grad(sum((t * w).sum() for t, w in zip(r, weights)), leaves) for r in results]
    for found, wanted in [*zip(*results), *zip(*grads)]:
        # products of numbers with 8 bits, of which dt x is rounded once more; summed in fp32
        assert (found - wanted).abs().max() < 2**-5 * wanted.abs().max()
