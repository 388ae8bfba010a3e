"""Each collective against the same map written on the stacked tensors of all ranks, whose gradient autograd knows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.parallel import collectives
from tests.distributed import device, run_ranks

RANKS, SHAPE = 4, (3, 8, 5)  # B, T, D
DIM = 1


def inputs(name: str) -> tuple[Tensor, Tensor]:
    """What the ranks hold, stacked (R, B, T, D), and the gradients that arrive at the results, stacked."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(RANKS, *SHAPE, generator=generator, dtype=torch.float64)
    if name in ("copy_in", "scatter"):
        x[:] = x[0]  # replicated
    length = {"sequence_gather": 32, "gather": 32, "sequence_reduce_scatter": 2, "scatter": 2}.get(name, 8)
    grad = torch.randn(RANKS, 3, length, 5, generator=generator, dtype=torch.float64)
    if name in ("reduce_out", "gather"):
        grad[:] = grad[0]  # replicated: all ranks continue with the result in the same way
    return x, grad


def everywhere(result: Tensor) -> Tensor:
    return result.expand(RANKS, *result.shape)


# The global map from stacked inputs to stacked results. Where an input (or gradient) is replicated it is ONE tensor, so
# its gradient is the sum over the ranks (or it counts once).
GLOBAL: dict[str, Callable[[Tensor], Tensor]] = {
    "copy_in": lambda x: everywhere(x),
    "reduce_out": lambda x: x.sum(0, keepdim=True),
    "total": lambda x: everywhere(x.sum(0)),
    "sequence_gather": lambda x: everywhere(torch.cat(list(x), DIM)),
    "gather": lambda x: torch.cat(list(x), DIM)[None],
    "sequence_reduce_scatter": lambda x: torch.stack(x.sum(0).chunk(RANKS, DIM)),
    "scatter": lambda x: torch.stack(x.chunk(RANKS, DIM)),
}


def run_one(rank: int, world_size: int, name: str, strided: bool) -> tuple[Tensor, Tensor]:
    stacked, grads = inputs(name)
    x, grad = stacked[rank].to(device(), copy=True), grads[rank].to(device())
    if strided:
        x, grad = (t.transpose(0, 2).contiguous().transpose(0, 2) for t in (x, grad))
        assert not x.is_contiguous()
    x.requires_grad_()
    function = getattr(collectives, name)
    group = dist.group.WORLD
    y = function(x * 1.0, group, **({} if name in ("copy_in", "reduce_out", "total") else {"dim": DIM}))
    y.backward(grad)
    return y.detach().cpu(), x.grad.cpu()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("name", GLOBAL)
def test_forward_and_backward(name: str, strided: bool) -> None:
    stacked, grads = inputs(name)
    replicated_input, once = name in ("copy_in", "scatter"), name in ("reduce_out", "gather")
    x = (stacked[0] if replicated_input else stacked).clone().requires_grad_()
    y = GLOBAL[name](x)
    y.backward(grads[:1] if once else grads)
    assert x.grad is not None
    for rank, (y_local, x_grad) in enumerate(run_ranks(RANKS, run_one, name, strided)):
        # float64, sums of four terms: only their order may differ
        torch.testing.assert_close(y_local, y.detach()[0 if once else rank], rtol=0, atol=1e-14)
        torch.testing.assert_close(x_grad, x.grad if replicated_input else x.grad[rank], rtol=0, atol=1e-14)


def uneven(rank: int, world_size: int) -> str:
    try:
        collectives.sequence_reduce_scatter(torch.zeros(2, 7, 3, device=device()), dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return ""


def test_a_sequence_that_does_not_divide_is_named() -> None:
    assert all("7 entries, which do not divide over parallel.tp=2" in text for text in run_ranks(2, uneven))
