"""The FP8 recipes as config: `precision=fp8_delayed|fp8_current|fp8_block|mxfp8`, each with its own numbers.

The products of linear layers are FP8 (`quantizers.py`), everything else is what `precision=bf16` makes of it: fp32 master weights,
bf16 weights in forward and backward, norms, softmax and loss in fp32. Embedding, head, norms, convolutions and scans are never FP8.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from megatron_lite.precision.delayed import AMAX_COMPUTE
from megatron_lite.precision.dtypes import PrecisionConfig
from megatron_lite.precision.formats import E4M3, E5M2, Format

BACKENDS = ("auto", "transformer_engine", "emulated")

# name -> the formats of inputs and weights, and of gradients
FORMATS: dict[str, tuple[Format, Format]] = {"hybrid": (E4M3, E5M2), "e4m3": (E4M3, E4M3), "e5m2": (E5M2, E5M2)}


@dataclass
class Fp8Config:
    """What all recipes have in common.

    backend: transformer_engine | emulated (computed with torch, anywhere, slowly) | auto (the first on a GPU, else the second).
    format: hybrid (E4M3, gradients E5M2) | e4m3 | e5m2 (emulated only).
    bf16_first_layers, bf16_last_layers: so many layers of `decoder.layers` stay bf16. A layer is one symbol of the pattern.
    fallback_after: spikes on a rung until the run computes more exactly, 0 for never (see training/ladder.py).
    bf16_modules: names of linear layers that stay bf16, as shell patterns: "layers.*.mixer.out_proj".
    all_gather: bf16 | fp8, in which FSDP2 gathers the weights of FP8 layers (see `gathered.py`).
    """

    name: str = ""
    backend: str = "auto"
    format: str = "hybrid"
    bf16_first_layers: int = 0
    bf16_last_layers: int = 0
    bf16_modules: list[str] = field(default_factory=list)
    fallback_after: int = 0
    all_gather: str = "bf16"

    dtype: ClassVar[torch.dtype] = torch.bfloat16  # of everything that is not FP8
    peak: ClassVar[str] = "fp8"  # see `hardware.device_peak_flops`
    size_divisor: ClassVar[int] = 16  # Transformer Engine multiplies matrices whose sides are multiples of it
    operand_formats: ClassVar[str] = "one scale a tensor"
    shard_rows: ClassVar[int] = (
        1  # a shard of a weight can be quantized without the others in multiples of so many rows
    )

    def validate(self) -> None:
        """Raise ValueError naming the key if a value is invalid."""
        if self.name != type(self).name:
            raise ValueError(
                f"precision.name={self.name} does not belong to precision={type(self).name}; choose precision={self.name}"
            )
        _one_of("backend", self.backend, BACKENDS)
        _one_of("format", self.format, tuple(FORMATS))
        if self.format == "e5m2" and self.backend != "emulated":
            raise ValueError(
                "precision.format=e5m2: Transformer Engine has no E5M2 forward; choose hybrid or e4m3, or precision.backend=emulated"
            )
        _one_of("all_gather", self.all_gather, ("bf16", "fp8"))
        if self.all_gather == "fp8" and self.fallback_after:
            raise ValueError(
                f"precision.all_gather=fp8 with precision.fallback_after={self.fallback_after}: a run that falls back computes with bf16 "
                "weights, which would not be there; set precision.all_gather=bf16, or precision.fallback_after=0"
            )
        for key in ("bf16_first_layers", "bf16_last_layers", "fallback_after"):
            if getattr(self, key) < 0:
                raise ValueError(f"precision.{key}={getattr(self, key)} must not be negative")

    def backend_on(self, device: torch.device) -> str:
        """The backend on this device: transformer_engine or emulated."""
        if self.backend == "auto":
            return "transformer_engine" if device.type == "cuda" else "emulated"
        return self.backend

    def warn_if_slow(self, device: torch.device) -> None:
        """See `PrecisionConfig`. Nothing: who asks for an emulation on a GPU studies numbers."""

    @property
    def formats(self) -> tuple[Format, Format]:
        """The format of inputs and weights, and that of gradients."""
        return FORMATS[self.format]


@dataclass
class DelayedScalingConfig(Fp8Config):
    """One scale a tensor, from the largest numbers of earlier micro-batches (see `delayed.py`).

    margin: scales are smaller by 2^margin. amax_history_len: micro-batches looked back at. amax_compute: max | most_recent.
    amax: global; the histories are those of all ranks together.
    """

    name: str = "fp8_delayed"
    margin: int = 0
    amax_history_len: int = 1024
    amax_compute: str = "max"
    amax: str = "global"

    def validate(self) -> None:
        """See `Fp8Config`."""
        super().validate()
        _one_of("amax_compute", self.amax_compute, AMAX_COMPUTE)
        if self.amax_history_len < 1:
            raise ValueError(f"precision.amax_history_len={self.amax_history_len} must be at least 1")
        if abs(self.margin) > 30:
            raise ValueError(
                f"precision.margin={self.margin} must be between -30 and 30: scales are divided by 2^margin"
            )
        if self.amax != "global":
            raise ValueError(
                f"precision.amax={self.amax} with precision=fp8_delayed: histories of single ranks could not be continued at another "
                "layout; set global, or choose precision=fp8_current"
            )


@dataclass
class CurrentScalingConfig(Fp8Config):
    """One scale a tensor, from the tensor itself.

    power_2_scales: scales rounded down to powers of two. amax: local (what a rank holds of the tensor, as Transformer Engine does) |
    global (the tensor of all ranks: one all-reduce for every operand).
    """

    name: str = "fp8_current"
    power_2_scales: bool = False
    amax: str = "local"

    def validate(self) -> None:
        """See `Fp8Config`."""
        super().validate()
        _one_of("amax", self.amax, ("local", "global"))


@dataclass
class BlockScalingConfig(Fp8Config):
    """One scale for each 128 x 128 block of a weight and each 1 x 128 tile of inputs and gradients (DeepSeek-V3, arXiv 2412.19437)."""

    name: str = "fp8_block"
    format: str = "e4m3"
    power_2_scales: bool = True

    operand_formats: ClassVar[str] = "weights 128 x 128, else 1 x 128"
    shard_rows: ClassVar[int] = 128


@dataclass
class MXScalingConfig(Fp8Config):
    """One power of two for each 32 elements (OCP Microscaling Formats 1.0). Needs Blackwell, or the emulation."""

    name: str = "mxfp8"
    format: str = "e4m3"

    size_divisor: ClassVar[int] = 32
    operand_formats: ClassVar[str] = "1 x 32"

    def validate(self) -> None:
        """See `Fp8Config`."""
        super().validate()
        if self.all_gather == "fp8":
            raise ValueError(
                "precision.all_gather=fp8 with precision=mxfp8: a weight is quantized along its rows and along its columns, which are "
                "together as many bytes as bf16; set precision.all_gather=bf16"
            )


@dataclass
class Nvfp4Config(PrecisionConfig):
    """`precision=nvfp4`, which is refused."""

    name: str = "nvfp4"

    def validate(self) -> None:
        """Raise ValueError."""
        raise ValueError(
            "precision=nvfp4: four-bit training needs random Hadamard transforms and stochastic rounding, which are not built; choose "
            f"one of {', '.join(RECIPES)}"
        )


RECIPES: dict[str, type[Fp8Config]] = {
    recipe.name: recipe for recipe in (DelayedScalingConfig, CurrentScalingConfig, BlockScalingConfig, MXScalingConfig)
}

Precision = PrecisionConfig | Fp8Config


def precision_class(name: str) -> type[Precision]:
    """The config class of `precision=<name>`."""
    return RECIPES.get(name, PrecisionConfig)


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"precision.{key}={value} is unknown; choose one of {', '.join(choices)}")
