"""The FP8 recipes computed by Transformer Engine, on an NVIDIA GPU. The only file that imports `transformer_engine`.

A linear layer stays the module that it was; only `product` of `models.linear.Linear` goes through a `te.Linear` (2.20 or newer).
That one is built on the meta device, gives up its own parameter, is not a child of any module, and gets the layer's weight handed
in at every call. So names, shapes, checkpoints, sharding by FSDP2 or ZeRO and the collectives of tensor parallelism are those of
bf16: nothing of them knows about Transformer Engine, and it knows nothing about them.

Notable features:
- One `te.autocast` for each micro-batch, around forward and backward: it is state of the whole process, and recomputed layers run in
  backward. Not one inside another: leaving it, TE forgets which layer was the first, and delayed histories would advance again.
- Where weights stay in memory for a step, TE keeps their FP8 form for backward and for all micro-batches. Where they are sharded
  again after forward, it makes it again in backward from the gathered weight.
- Delayed scaling: TE reduces its maxima over all ranks and advances its histories; they are read and written as four tensors a layer,
  under the names of `emulated.py`. TE's own state is a pickle and is never asked for. TE records maxima in evaluations too:
  `forward_only` puts the state back.
- While operands are observed (`collect`), the emulation computes, with TE's scales: inside TE's kernels they cannot be seen.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_lite.precision.delayed import DelayedScaling
from megatron_lite.precision.emulated import EmulatedNumerics
from megatron_lite.precision.gathered import QuantizedWeight, check_rows
from megatron_lite.precision.numerics import Numerics, Observation
from megatron_lite.precision.quantized_linear import BF16, FP8_FORWARD, QuantizedLinear
from megatron_lite.precision.recipes import (
    BlockScalingConfig,
    CurrentScalingConfig,
    DelayedScalingConfig,
    Fp8Config,
    MXScalingConfig,
)
from megatron_lite.precision.transformer_engine_weights import WeightHistory, as_transformer_engine

if TYPE_CHECKING:
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

INSTALL = "pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]>=2.20' (core_cu12 with CUDA 12)"


class TransformerEngineLinear(QuantizedLinear):
    """Mixed in before a linear layer's class, with the attributes of `QuantizedLinear` and `multiply`."""

    multiply: Callable[[Tensor, Tensor], Tensor]

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., K) -> (..., N)."""
        if self.mode.rung == BF16 or self.mode.observe is not None:
            return super().product(x, bias)
        y = self.multiply(x, self.weight)
        return y if bias is None else y + bias


@dataclass
class _Pass:
    """What all products share of the pass that is going on. first: the micro-batch is the first of its step with these weights;
    None: weights are not kept."""

    in_autocast: bool = False
    keep_weights: bool = True
    first: bool | None = None


class TransformerEngineNumerics(Numerics):
    """The numerics of a decoder's FP8 layers. emulation: of the same recipe and layers.

    Raises ValueError if Transformer Engine or this machine does not have the recipe.
    """

    def __init__(self, recipe: Fp8Config, emulation: EmulatedNumerics) -> None:
        self.te, recipe_module = load()
        check_available(recipe, self.te)
        self.emulation = emulation
        self.rungs = emulation.rungs
        self.recipes = {rung: build_recipe(recipe, recipe_module, rung=rung) for rung in self.rungs if rung != BF16}
        self.pass_ = _Pass()
        self.linears: dict[str, te.Linear] = {}
        self.delayed = isinstance(recipe, DelayedScalingConfig)

    def product(self, path: str, rows: int, columns: int) -> Callable[[Tensor, Tensor], Tensor]:
        """(x (..., K), weight (N, K)) -> y (..., N) for the layer `path`, whose weight is rows x columns."""
        linear = _linear_class(self.te)(columns, rows, bias=False, device="meta", params_dtype=torch.bfloat16)
        del linear.weight
        linear.fast_setattr("pass_", self.pass_)
        if self.delayed:
            with torch.no_grad(), self._autocast():  # with gradients, leaving it would advance other models' histories
                linear.init_fp8_metadata()
        self.linears[path] = linear

        def multiply(x: Tensor, weight: Tensor) -> Tensor:
            if isinstance(weight, QuantizedWeight):
                weight = as_transformer_engine(weight, self.te, columnwise=self.pass_.keep_weights)
            linear.fast_setattr("weight", weight)
            with nullcontext() if self.pass_.in_autocast else self._autocast():
                return linear(x, is_first_microbatch=self.pass_.first)

        return torch.compiler.disable(multiply)

    @property
    def rung(self) -> str:
        """See `EmulatedNumerics`."""
        return self.emulation.rung

    @rung.setter
    def rung(self, rung: str) -> None:
        self.emulation.rung = rung

    @contextmanager
    def step(self, *, keep_weights: bool) -> Iterator[None]:
        """See `Numerics`."""
        self.pass_.keep_weights = keep_weights
        self.pass_.first = True if keep_weights else None
        try:
            with self.emulation.step(keep_weights=keep_weights):
                yield
        finally:
            self.pass_.first = None

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """See `Numerics`."""
        with self._pass():
            yield
        self.pass_.first = None if self.pass_.first is None else False

    @contextmanager
    def forward_only(self) -> Iterator[None]:
        """See `Numerics`."""
        before = {name: tensor.clone() for name, tensor in self.tensors().items()}
        try:
            with self.emulation.forward_only(), self._pass():
                yield
        finally:
            for name, tensor in self.tensors().items():
                tensor.copy_(before[name])

    @contextmanager
    def collect(self, observe: Callable[[Observation], None]) -> Iterator[None]:
        """See `Numerics`."""
        emulated = self.emulation.tensors()
        for name, tensor in self.tensors().items():
            emulated[name].copy_(tensor)
        with self.emulation.collect(observe):
            yield

    def tensors(self) -> dict[str, Tensor]:
        """See `Numerics`. TE has further columns, for the output and the gradient of the input, which stay in bf16."""
        found = {}
        for path, linear in self.linears.items() if self.delayed else ():
            for direction, columns in (("fwd", 2), ("bwd", 1)):
                state = linear.fp8_meta[f"scaling_{direction}"]
                found[f"scale_{direction}.{path}"] = state.scale[:columns]
                found[f"amax_history_{direction}.{path}"] = state.amax_history[:, :columns]
        return found

    @property
    def gathered(self) -> Sequence[str]:
        """See `Numerics`."""
        return self.emulation.gathered

    def gather(self, path: str, shard: Tensor, *, rows: int, ranks: int) -> None:
        """See `Numerics`."""
        check_rows(path, rows, ranks=ranks, multiple=self.emulation.recipe.shard_rows)
        quantizer = self.emulation.quantizers(path).weight
        if isinstance(quantizer, DelayedScaling):
            quantizer = replace(quantizer, histories=WeightHistory(self.linears[path]), index=1)
        self.emulation.sharded.add(shard, quantizer)

    @contextmanager
    def _pass(self) -> Iterator[None]:
        with nullcontext() if self.rung == BF16 else self._autocast():
            self.pass_.in_autocast = self.rung != BF16
            try:
                yield
            finally:
                self.pass_.in_autocast = False

    def _autocast(self) -> AbstractContextManager[Any]:
        return self.te.autocast(enabled=True, recipe=self.recipes[self.rung])


def load() -> tuple[ModuleType, ModuleType]:
    """(transformer_engine.pytorch, its recipes). Raises ValueError where they cannot be imported or are too old.

    The package without its compiled parts raises RuntimeError when it is imported, a missing CUDA library OSError.
    """
    try:
        te = importlib.import_module("transformer_engine.pytorch")
        recipe = importlib.import_module("transformer_engine.common.recipe")
    except Exception as error:
        raise ValueError(
            f"precision.backend=transformer_engine needs Transformer Engine ({type(error).__name__}: {error}): {INSTALL}, "
            "or set precision.backend=emulated"
        ) from error
    if not hasattr(te, "autocast"):
        raise ValueError(f"precision.backend=transformer_engine needs Transformer Engine 2.20 or newer: {INSTALL}")
    return te, recipe


def check_available(recipe: Fp8Config, te: ModuleType) -> None:
    """Raise ValueError where the GPU, its CUDA version or Transformer Engine does not have the recipe."""
    available: dict[type[Fp8Config], tuple[Callable[..., Any], str]] = {
        DelayedScalingConfig: (te.is_fp8_available, "bf16"),
        CurrentScalingConfig: (te.is_fp8_available, "bf16"),
        BlockScalingConfig: (te.is_fp8_block_scaling_available, "fp8_current"),
        MXScalingConfig: (te.is_mxfp8_available, "fp8_block"),
    }
    ask, instead = available[type(recipe)]
    try:
        has_it, reason = ask(return_reason=True)
    except Exception as error:  # there is no GPU to ask
        has_it, reason = False, str(error)
    if not has_it:
        raise ValueError(
            f"precision={recipe.name} with precision.backend=transformer_engine: {reason.rstrip('.')}; set precision={instead}, or "
            "precision.backend=emulated, which computes the same slowly"
        )
    if isinstance(recipe, CurrentScalingConfig) and recipe.amax == "global":
        raise ValueError(
            "precision.amax=global with precision=fp8_current: Transformer Engine takes each rank's own maximum; set precision.amax=local, "
            "or precision.backend=emulated"
        )


def build_recipe(recipe: Fp8Config, recipe_module: ModuleType, *, rung: str) -> Any:
    """TE's recipe object with the numbers of ours. Every default that TE would take from the environment is given."""
    if TYPE_CHECKING:
        recipe_module = recipes
    common: dict[str, Any] = {
        "fp8_format": {"hybrid": recipe_module.Format.HYBRID, "e4m3": recipe_module.Format.E4M3}[recipe.format],
        "fp8_dpa": False,
        "fp8_mha": False,
        "backward_override": "high_precision" if rung == FP8_FORWARD else None,
    }
    if isinstance(recipe, DelayedScalingConfig):
        return recipe_module.DelayedScaling(
            margin=recipe.margin,
            amax_history_len=recipe.amax_history_len,
            amax_compute_algo=recipe.amax_compute,
            reduce_amax=True,
            **common,
        )
    if isinstance(recipe, MXScalingConfig):
        return recipe_module.MXFP8BlockScaling(margin=0, enable_2d_quantization=False, **common)
    if isinstance(recipe, BlockScalingConfig):
        made = recipe_module.Float8BlockScaling(
            use_f32_scales=not recipe.power_2_scales,
            x_block_scaling_dim=1,
            w_block_scaling_dim=2,
            grad_block_scaling_dim=1,
            **common,
        )
    else:
        assert isinstance(recipe, CurrentScalingConfig), f"{recipe.name} has no recipe in Transformer Engine"
        made = recipe_module.Float8CurrentScaling(use_power_2_scales=recipe.power_2_scales, **common)
    # What the quantizers read are these, which TE makes of the environment alone and not of the arguments above.
    operand = recipe_module.QParams(power_2_scale=recipe.power_2_scales, amax_epsilon=0.0)
    made.fp8_quant_fwd_inp = made.fp8_quant_fwd_weight = made.fp8_quant_bwd_grad = operand
    return made


def _linear_class(te: ModuleType) -> type[te.Linear]:
    """`te.Linear` that is told whether its weight stays in memory, instead of looking for FSDP2 around it, where it is not."""

    class Linear(te.Linear):  # type: ignore[name-defined]
        pass_: _Pass

        @property
        def is_fsdp2(self) -> bool:
            return not self.pass_.keep_weights

    return Linear
