"""Mamba-1's scan on a GPU: its compiled chunks against the CPU in float64, and mamba-ssm's kernel against them. Skips itself without
CUDA, and the kernel's part without the package."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_lite.models import selective_scan_kernel
from megatron_lite.models.scan import Operands, Past
from megatron_lite.models.selective_scan import selective_scan
from tests.models.test_selective_scan import inputs_of, values_and_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOLERANCE = 1e-5  # of the largest entry: fp32 sums of a few hundred terms, as on a CPU


def scanned(function, past: Past):
    return lambda *leaves: function(Operands(*leaves[:5]), past)


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_chunks(packed: bool) -> None:
    inputs, documents = inputs_of(600, 2.0, 0)[:5], None
    if packed:
        documents = (torch.arange(600)[None] > torch.tensor([[99], [333]])).long()
    wanted = values_and_gradients(scanned(selective_scan, Past(documents_BT=documents, prefix=5)), inputs)
    moved = [tensor.float().cuda() for tensor in inputs]
    past = Past(documents_BT=None if documents is None else documents.cuda(), prefix=5)
    check(values_and_gradients(scanned(selective_scan, past), moved), wanted)


def test_the_kernel() -> None:
    pytest.importorskip("mamba_ssm", exc_type=ImportError)
    assert selective_scan_kernel.installed_kernel() is not None
    leaves = [tensor.float().cuda().requires_grad_() for tensor in inputs_of(600, 2.0, 0)[:5]]
    found, wanted = [], []
    for function, results in ((selective_scan_kernel.scan, found), (selective_scan, wanted)):
        y, state = function(Operands(*leaves))
        results += [y, state, *torch.autograd.grad(y.square().sum(), leaves)]
    check(found, wanted)


def check(found: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.cpu() - theirs.cpu()).abs().max() <= TOLERANCE * theirs.abs().max()
