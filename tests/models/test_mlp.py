"""The activation that gives its derivative itself, against plain autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_lite.models.mlp import squared_relu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squared_relu_is_that_of_plain_autograd_to_the_last_bit(dtype):
    x = torch.randn(16, 64, dtype=dtype)
    x[0, :4] = torch.tensor([0.0, -0.0, torch.inf, torch.nan])
    d_y = torch.randn(16, 64, dtype=dtype)
    results = []
    for function in (squared_relu, lambda x: F.relu(x).square()):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.backward(d_y)
        results.append((y, leaf.grad))
    for mine, plain in zip(*results):
        torch.testing.assert_close(mine, plain, rtol=0, atol=0, equal_nan=True)
