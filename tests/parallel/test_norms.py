"""Norms over a sharded width, and replicated norms in bf16, against the plain ones."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lite.models.norm import NORMS
from megatron_lite.parallel.layers import TensorParallel
from megatron_lite.parallel.plans import apply_plan, replicated_norm, shard, sharded_norm
from tests.distributed import run_ranks

WIDTH = 24


def norm_and_input(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    norm = NORMS[name](WIDTH, 1e-5)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    return norm, torch.randn(4, 6, WIDTH) + 0.5, torch.randn(4, 6, WIDTH)


def tensor_parallel(rank: int, world_size: int, *, sequence: bool = False) -> TensorParallel:
    group = dist.group.WORLD
    assert group is not None
    return TensorParallel(rank, world_size, group, sequence)


def sharded(rank: int, world_size: int, name: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    norm, x, grad = norm_and_input(name)
    root = nn.ModuleDict({"norm": norm})
    apply_plan(root, {"norm": (sharded_norm,)}, tensor_parallel(rank, world_size))
    local = x.chunk(world_size, -1)[rank].clone().requires_grad_()
    y = root["norm"](local)
    y.backward(grad.chunk(world_size, -1)[rank])
    assert local.grad is not None
    return y.detach(), local.grad, {key: p.grad for key, p in norm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NORMS)
def test_statistics_over_a_sharded_width(name: str) -> None:
    norm, x, grad = norm_and_input(name)
    y = norm(x.requires_grad_())
    y.backward(grad)
    assert x.grad is not None
    parts = run_ranks(2, sharded, name)
    # fp32 values of size 1 to 10, sums of 24 terms in another order
    torch.testing.assert_close(torch.cat([p[0] for p in parts], -1), y.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([p[1] for p in parts], -1), x.grad, rtol=1e-5, atol=1e-5)
    for key, parameter in norm.named_parameters():
        joined = torch.cat([p[2][key] for p in parts])
        torch.testing.assert_close(joined, parameter.grad, rtol=1e-5, atol=1e-5)


def replicated_bf16(rank: int, world_size: int, name: str) -> dict[str, Tensor]:
    norm, x, grad = norm_and_input(name)
    norm.to(torch.bfloat16)
    root = nn.ModuleDict({"norm": norm})
    apply_plan(root, {"norm": (replicated_norm,)}, tensor_parallel(rank, world_size, sequence=True))
    local, local_grad = (t.bfloat16().chunk(world_size, 1)[rank] for t in (x, grad))
    root["norm"](local).backward(local_grad)
    return {key: p.grad for key, p in norm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NORMS)
def test_replicated_gradients_are_summed_in_fp32(name: str) -> None:
    norm, x, grad = norm_and_input(name)
    norm.to(torch.bfloat16)
    norm(x.bfloat16()).backward(grad.bfloat16())
    for gradients in run_ranks(2, replicated_bf16, name):
        for key, parameter in norm.named_parameters():
            # The same fp32 sum in two halves, rounded to bf16 once: at most the last place (2^-8) differs.
            torch.testing.assert_close(gradients[key], parameter.grad, rtol=2**-7, atol=0)
            assert (gradients[key] == parameter.grad).float().mean() > 0.9


class Decay(nn.Module):
    """Stands for a state-space layer: a plain parameter, one entry a head."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.arange(8.0).view(2, 4))


def cut_plain_parameter(rank: int, world_size: int) -> tuple[Tensor, dict[str, int]]:
    root = nn.ModuleDict({"mixer": Decay()})
    apply_plan(root, {"mixer.decay": (shard(1),)}, tensor_parallel(rank, world_size))
    return root["mixer"].decay.detach(), root["mixer"].tp_dims


def test_a_plain_parameter_is_cut() -> None:
    parts = run_ranks(2, cut_plain_parameter)
    assert torch.equal(torch.cat([part for part, _ in parts], 1), torch.arange(8.0).view(2, 4))
    assert parts[0][1] == {"decay": 1}
