"""What FSDP2 did to a module or a tensor, asked without importing FSDP2.

One process shards nothing, and FSDP2's import (DTensor, sympy) takes longer than building a tiny model. Where nobody has imported it,
nothing is sharded.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def fsdp_module(module: nn.Module | None) -> TypeGuard[FSDPModule]:
    """Whether `module` is a group of FSDP2, with the methods of `FSDPModule`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether `tensor` is a DTensor, of which this process holds a shard."""
    dtensor = sys.modules.get("torch.distributed.tensor")
    return dtensor is not None and isinstance(tensor, dtensor.DTensor)


def local_shard(tensor: Tensor) -> Tensor:
    """What this process holds of `tensor`, without gradient, sharing its memory."""
    return (tensor.to_local() if is_sharded(tensor) else tensor).detach()
