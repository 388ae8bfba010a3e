"""The kernels of a divided sequence's attention on one GPU, against plain torch in float64. Skips itself without CUDA."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_lite.parallel.context_kernels import Math, Part, attend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("seen", ["all", "causal", "some"])
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (256, 256), (20, 20), (64, 128), (20, 36)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)]
)  # bf16: 2^-8 of sums of 200
def test_a_part_is_right(dtype: torch.dtype, tolerance: float, widths: tuple[int, int], seen: str) -> None:
    """Keys and values lie side by side, as they travel; some queries of a mask see none of the keys."""
    draw, queries = torch.Generator().manual_seed(0), 200 if seen == "causal" else 72

    def normal(heads: int, tokens: int, width: int) -> Tensor:
        return torch.randn(2, heads, tokens, width, generator=draw).to("cuda", dtype)

    query, kv, grad = normal(6, queries, widths[0]), normal(2, 200, sum(widths)), normal(6, queries, widths[1])
    mask = torch.rand(2, 1, queries, 200, generator=draw) < 0.5 if seen == "some" else None
    if mask is not None:
        mask[:, :, 5] = False
    on_gpu = Part(query, *kv.split(widths, dim=3), mask=None if mask is None else mask.cuda(), causal=seen == "causal")
    exact = Part(
        *(x.double().cpu() for x in (on_gpu.query_BHTK, on_gpu.key_BGSK, on_gpu.value_BGSV)), mask, on_gpu.causal
    )
    out, lse = attend(on_gpu)
    seen_BHT = torch.ones_like(lse, dtype=torch.bool).cpu() if mask is None else mask.any(-1).expand(lse.shape)
    if mask is not None:  # a query without keys has no softmax
        exact = replace(exact, mask=mask | ~mask.any(-1, keepdim=True))
    wanted, wanted_lse = Math().forward(exact)
    assert (lse.cpu()[~seen_BHT] == -torch.inf).all()
    compare(lse.cpu()[seen_BHT], wanted_lse[seen_BHT], tolerance)
    compare(out.cpu()[seen_BHT], wanted[seen_BHT], tolerance)
    # backward is given what all keys together gave; here these are all, and queries that see none are left out
    on_gpu = replace(on_gpu, mask=None if exact.mask is None else exact.mask.cuda())
    grads = on_gpu.kernel().backward(on_gpu, grad, wanted.to(out), wanted_lse.to(lse))
    for got, expected in zip(grads, Math().backward(exact, grad.double().cpu(), wanted, wanted_lse)):
        compare(got.cpu(), expected, tolerance)


def compare(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest entry."""
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=tolerance * wanted.abs().max().item())
