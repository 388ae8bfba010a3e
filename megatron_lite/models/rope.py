"""Rotary position embedding (RoFormer, arXiv 2104.09864), on the first R of the K dimensions of a head,
half-split.

For pair j of R/2, at position p:  angle = p f_j,  (a, b) -> (a cos - b sin, b cos + a sin),  where
a is dimension j and b dimension j + R/2 ("rotate half"). Nemotron-4 rotates half of a head's dimensions
(fraction 0.5).

The frequency of a pair is f_j = base^(-2j/R), or what `SCALINGS` makes of it so that a model works on longer sequences than
it was first trained on:

    linear   f_j / factor                                                         position interpolation, arXiv 2306.15595
    ntk      a larger base: base (factor L/l - factor + 1)^(R/(R-2))              Hymba; transformers' "dynamic" at length L
    llama3   f_j / factor for slow pairs, f_j for fast ones, a blend between      Llama 3.1
    yarn     the same idea; also cosines and sines times 0.1 ln(factor) + 1       arXiv 2309.00071

L is model.max_seq_len and l model.rope.original_seq_len. A pair turns l f_j / 2 pi times within the original length. llama3 calls it
slow below low_freq_factor turns and fast above high_freq_factor, and blends by the number of turns; yarn blends by the number of the
pair, from the one with beta_fast turns to the one with beta_slow. All are as transformers computes them.

The tables are computed in every forward, in float32 (in float64 for a float64 model): nothing to store in a
checkpoint, no limit on the length, and positions may restart at documents.

Shapes: B batch (1 when all rows share their positions), T sequence, G KV groups, N heads in a group, K head
dim, R rotary dims, Z = R/2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lite.models.config import ModelConfig, RopeConfig


class Rotary:
    """The rotary tables of a model. dim: R, how many of a head's dimensions rotate; 0 = no position embedding."""

    def __init__(self, config: ModelConfig) -> None:
        self.rope, self.dim, self.max_seq_len = config.rope, config.rotary_dim, config.max_seq_len

    def tables(self, positions_BT: Tensor, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, T, 1, 1, R/2) in `dtype`, on the positions' device."""
        exponents_Z = torch.arange(0, self.dim, 2, dtype=dtype, device=positions_BT.device) / self.dim
        scaling = SCALINGS[self.rope.scaling]
        angles_BTZ = positions_BT.to(dtype)[..., None] * scaling.frequencies(self, exponents_Z)
        angles = angles_BTZ[:, :, None, None, :]
        factor = scaling.attention_factor(self.rope)
        if factor == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * factor, angles.sin() * factor


def _unscaled(rotary: Rotary, exponents_Z: Tensor) -> Tensor:
    return 1.0 / rotary.rope.base**exponents_Z


def _linear(rotary: Rotary, exponents_Z: Tensor) -> Tensor:
    return _unscaled(rotary, exponents_Z) / rotary.rope.factor


def _ntk(rotary: Rotary, exponents_Z: Tensor) -> Tensor:
    rope, dim = rotary.rope, rotary.dim
    longer = rope.factor * rotary.max_seq_len / _original(rope) - (rope.factor - 1)
    return 1.0 / (rope.base * longer ** (dim / (dim - 2))) ** exponents_Z


def _llama3(rotary: Rotary, exponents_Z: Tensor) -> Tensor:
    rope, fast_Z = rotary.rope, _unscaled(rotary, exponents_Z)
    turns_Z = _original(rope) * fast_Z / (2 * math.pi)
    weight_Z = (turns_Z - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return _blend(fast_Z / rope.factor, fast_Z, weight_Z.clamp(0, 1))


def _yarn(rotary: Rotary, exponents_Z: Tensor) -> Tensor:
    rope, dim, fast_Z = rotary.rope, rotary.dim, _unscaled(rotary, exponents_Z)

    def pair_with(turns: float) -> float:
        return dim * math.log(_original(rope) / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    first = max(math.floor(pair_with(rope.beta_fast)), 0)
    last = min(math.ceil(pair_with(rope.beta_slow)), dim - 1)
    pairs_Z = torch.arange(dim // 2, dtype=exponents_Z.dtype, device=exponents_Z.device)
    weight_Z = 1 - ((pairs_Z - first) / ((last - first) or 0.001)).clamp(0, 1)
    return _blend(fast_Z / rope.factor, fast_Z, weight_Z)


def _blend(slow_Z: Tensor, fast_Z: Tensor, weight_Z: Tensor) -> Tensor:
    """weight 0: slow, 1: fast."""
    return (1 - weight_Z) * slow_Z + weight_Z * fast_Z


def _original(rope: RopeConfig) -> int:
    assert rope.original_seq_len is not None  # `check` sees to it
    return rope.original_seq_len


def _one(rope: RopeConfig) -> float:
    return 1.0


def _yarn_attention_factor(rope: RopeConfig) -> float:
    return 0.1 * math.log(rope.factor) + 1.0 if rope.attention_factor is None else rope.attention_factor


@dataclass(frozen=True)
class Scaling:
    """A row of the table.

    frequencies: of (rotary, exponents 2j/R (Z,)), the frequencies f (Z,). numbers: the keys of RopeConfig that it reads.
    attention_factor: what cosines and sines are multiplied by.
    """

    frequencies: Callable[[Rotary, Tensor], Tensor]
    numbers: tuple[str, ...] = ()
    attention_factor: Callable[[RopeConfig], float] = _one


SCALINGS: dict[str | None, Scaling] = {
    None: Scaling(_unscaled),
    "linear": Scaling(_linear, ("factor",)),
    "ntk": Scaling(_ntk, ("factor", "original_seq_len")),
    "llama3": Scaling(_llama3, ("factor", "original_seq_len", "low_freq_factor", "high_freq_factor")),
    "yarn": Scaling(
        _yarn, ("factor", "original_seq_len", "beta_fast", "beta_slow", "attention_factor"), _yarn_attention_factor
    ),
}


def check(config: ModelConfig) -> None:
    """Raises ValueError naming the key of `config.rope` that an attention layer cannot have."""
    rope = config.rope
    if config.rotary_dim % 2:
        raise ValueError(
            f"model.rope.fraction={rope.fraction} of head dim {config.head_dim} rotates "
            f"{config.rotary_dim} dimensions, which must be an even number"
        )
    if rope.scaling not in SCALINGS:
        known = ", ".join("null" if name is None else name for name in SCALINGS)
        raise ValueError(f"model.rope.scaling={rope.scaling!r} is not one of {known}")
    numbers = SCALINGS[rope.scaling].numbers
    for field in fields(RopeConfig):
        is_number_of_a_scaling = any(field.name in scaling.numbers for scaling in SCALINGS.values())
        value = getattr(rope, field.name)
        if is_number_of_a_scaling and field.name not in numbers and value != field.default:
            raise ValueError(
                f"model.rope.{field.name}={value} has no effect with model.rope.scaling={rope.scaling or 'null'}, which reads "
                f"{', '.join(numbers) or 'no numbers'}; drop it or choose another scaling"
            )
    if rope.scaling is not None:
        _check_numbers(config, numbers)


def _check_numbers(config: ModelConfig, numbers: tuple[str, ...]) -> None:
    rope = config.rope
    if config.rotary_dim == 0:
        raise ValueError(
            f"model.rope.scaling={rope.scaling} scales nothing with model.rope.fraction={rope.fraction}; set it to null"
        )
    for key in numbers:
        value = getattr(rope, key)
        if value is None and key == "attention_factor":
            continue
        if value is None:
            raise ValueError(f"model.rope.scaling={rope.scaling} needs model.rope.{key}, which is not given")
        least = 1.0 if key in ("factor", "original_seq_len") else 0.0
        if not (math.isfinite(value) and value >= least and value > 0):
            raise ValueError(
                f"model.rope.{key}={value} must be {'at least 1' if least else 'a positive number'} with "
                f"model.rope.scaling={rope.scaling}"
            )
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if low in numbers and getattr(rope, low) >= getattr(rope, high):
            raise ValueError(
                f"model.rope.{low}={getattr(rope, low)} must be below model.rope.{high}={getattr(rope, high)}"
            )
    if rope.scaling == "ntk" and (config.max_seq_len < _original(rope) or config.rotary_dim < 4):
        raise ValueError(
            f"model.rope.scaling=ntk stretches model.rope.original_seq_len={rope.original_seq_len} to model.max_seq_len="
            f"{config.max_seq_len}, which must not be shorter, over at least 4 rotary dimensions (here {config.rotary_dim})"
        )


def apply_rotary(x_BTGNK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first R dims of every head; computed in the tables' dtype, returned in x's dtype."""
    return _Rotary.apply(x_BTGNK, cos, sin)


class _Rotary(torch.autograd.Function):
    """The transpose of a rotation turns back: the gradient is rotated by the opposite angle.

    A copy is rotated in place, in a fraction of the time of plain autograd on a CPU, which makes a tensor of each product and joins
    the parts again, in both passes.
    """

    @staticmethod
    def forward(ctx: Any, x_BTGNK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x_BTGNK, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_BTGNK: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(d_y_BTGNK, cos, -sin), None, None


def _rotated(x_BTGNK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b = x_BTGNK[..., :half], x_BTGNK[..., half : 2 * half]
    y_BTGNK = x_BTGNK.to(cos.dtype, copy=True, memory_format=torch.contiguous_format)
    y_BTGNK[..., :half].mul_(cos).addcmul_(b, sin, value=-1.0)
    y_BTGNK[..., half : 2 * half].mul_(cos).addcmul_(a, sin)
    return y_BTGNK.to(x_BTGNK.dtype)


def restarting_positions(documents_BT: Tensor, *, prefix: int = 0) -> Tensor:
    """Position of each token within its document: 0, 1, 2, and `prefix` again where `documents_BT` changes.

    prefix: the first tokens of a row, which come before each of its documents and have the number of the first.
    """
    index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    # the first document begins with the prefix, which the others have before their first token
    zero_BT = torch.where(begins_BT, (index_T - prefix).clamp(min=0), 0).cummax(dim=1).values
    return index_T - zero_BT
