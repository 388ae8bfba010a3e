"""fp32 and bf16 training (FP8: see `recipes.py`).

Weights, gradients and optimizer state are always kept in fp32 ("master weights"); `bf16` means that every forward and backward
pass runs on a bf16 copy of the weights, that the gradient of that copy is added up in fp32, and that norms, softmax and loss
compute in fp32. It is what FSDP2's `MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=fp32)` does; `computing_in` is the same
for one process.

A module with the attribute `compute_in_fp32 = True` keeps its parameters in fp32 in every pass, on every engine (a scan's decay
rates, for one: an error in them grows with the length of the sequence). It uses them in its own `forward`; outside of it they may
be sharded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn.utils.stateless import _reparametrize_module

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class PrecisionConfig:
    """`name` is fp32 or bf16: the dtype in which matrix products run."""

    name: str = "fp32"

    fallback_after: ClassVar[int] = 0  # there is nothing more exact to fall back to

    def validate(self) -> None:
        """Raise ValueError for a name that is not in DTYPES."""
        if self.name not in DTYPES:
            raise ValueError(
                f"precision.name={self.name} is unknown; choose one of {', '.join(DTYPES)}, or an FP8 recipe by precision=<its file>"
            )

    def warn_if_slow(self, device: torch.device) -> None:
        """Warn where fp32 leaves a GPU's tensor cores idle: an H100 then reaches 67 TFLOP/s of 989."""
        if self.name == "fp32" and device.type == "cuda":
            warnings.warn(
                "precision=fp32 on a GPU leaves its tensor cores idle, at about a tenth of the speed; precision=bf16 uses them",
                stacklevel=2,
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return DTYPES[self.name]

    @property
    def peak(self) -> str:
        """What `hardware.device_peak_flops` calls it."""
        return self.name


def fp32_modules(module: nn.Module) -> list[nn.Module]:
    """The modules below (or `module` itself) that compute in fp32 whatever the precision of the run."""
    return [part for part in module.modules() if getattr(part, "compute_in_fp32", False)]


@contextmanager
def computing_in(dtype: torch.dtype, module: nn.Module) -> Iterator[None]:
    """Inside, the parameters of `module` are cast to `dtype` in the graph, so that gradients arrive in fp32; those of
    `fp32_modules` stay as they are.

    Backward belongs inside too where activations are recomputed: the layers run again, and must see the same weights.
    """
    if dtype is torch.float32:
        yield
        return
    kept = {parameter for part in fp32_modules(module) for parameter in part.parameters()}
    cast = {name: parameter.to(dtype) for name, parameter in module.named_parameters() if parameter not in kept}
    with _reparametrize_module(module, cast):  # what torch.func.functional_call does around one call
        yield
