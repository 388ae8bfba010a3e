"""Norms against float64 loops over the formulas."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.models.norm import LayerNorm, LayerNorm1p, RMSNorm

EPS = 1e-3  # large, so that a forgotten or misplaced eps shows


def reference(kind: type, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = []
    for row in x.double().reshape(-1, x.shape[-1]):
        if kind is RMSNorm:
            rows.append(weight.double() * row / (row.square().mean() + EPS).sqrt())
            continue
        gain = weight.double() + (1.0 if kind is LayerNorm1p else 0.0)
        centered = row - row.mean()
        rows.append(gain * centered / (centered.square().mean() + EPS).sqrt() + bias.double())
    return torch.stack(rows).reshape(x.shape)


@pytest.mark.parametrize("kind", [LayerNorm, LayerNorm1p, RMSNorm])
def test_norm_follows_its_formula(kind):
    torch.manual_seed(0)
    module = kind(24, EPS).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    x = torch.randn(3, 5, 24, dtype=torch.float64) * 0.1 + 0.5
    expected = reference(kind, x, module.weight, getattr(module, "bias", None))
    # a float64 model stays in float64 (2e-16 of values below 5); a step in float32 would be off by 1e-7
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", [LayerNorm, LayerNorm1p, RMSNorm])
def test_bf16_input_is_normalized_in_float32(kind):
    torch.manual_seed(0)
    module = kind(64, EPS)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    x = (torch.randn(8, 64) + 20.0).bfloat16()  # mean far from 0: bf16 arithmetic would lose the variance
    module.bfloat16()
    y = module(x)
    assert y.dtype == torch.bfloat16
    expected = reference(kind, x, module.weight, getattr(module, "bias", None))
    # one rounding to bf16 at the end (8 bits: at most 2^-8 relative), nothing else
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-5)
