"""fp32 and bf16 training.

Weights, gradients and optimizer state are always kept in fp32 ("master weights"); `bf16` means that every forward and backward
pass runs on a bf16 copy of the weights, that the gradient of that copy is added up in fp32, and that norms, softmax and loss
compute in fp32. It is what FSDP2's `MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=fp32)` does; `call_in` is the same for one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class PrecisionConfig:
    """`name` is fp32 or bf16: the dtype in which matrix products run."""

    name: str = "fp32"

    def validate(self) -> None:
        """Raise ValueError for a name that is not in DTYPES."""
        if self.name not in DTYPES:
            raise ValueError(f"precision.name={self.name} is unknown; choose one of {', '.join(DTYPES)}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return DTYPES[self.name]


def call_in(dtype: torch.dtype, module: nn.Module, *args: Any) -> Any:
    """`module(*args)` with its fp32 parameters cast to `dtype` inside the graph, so that gradients arrive in fp32."""
    if dtype is torch.float32:
        return module(*args)
    cast = {name: parameter.to(dtype) for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, cast, args)
