"""The FP8 recipes computed with torch, on any device: what a decoder's quantized layers share, and what they keep.

State of delayed scaling, by the name that it has in a checkpoint (of any layout and backend):

    scale_fwd.<layer> (2,)  amax_history_fwd.<layer> (H, 2)     input, weight
    scale_bwd.<layer> (1,)  amax_history_bwd.<layer> (H, 1)     gradient of the output
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.precision.delayed import DelayedScaling, Histories
from megatron_lite.precision.gathered import ShardedWeights, check_rows
from megatron_lite.precision.numerics import Numerics, Observation
from megatron_lite.precision.quantized_linear import BF16, FP8, RUNGS, Mode
from megatron_lite.precision.quantizers import BlockScaling, CurrentScaling, MXScaling, Quantizers, TileScaling
from megatron_lite.precision.recipes import (
    BlockScalingConfig,
    CurrentScalingConfig,
    DelayedScalingConfig,
    Fp8Config,
    MXScalingConfig,
)

Reduce = Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Maxima:
    """How a maximum becomes that of more ranks; None where there is one. weights: over the tensor-parallel ranks, which hold shards of
    a weight. activations: over those that hold a part of the batch or of its features, which is all of them. gathered: over the ranks
    from which FSDP2 gathers a weight."""

    weights: Reduce = None
    activations: Reduce = None
    gathered: Reduce = None


class EmulatedNumerics(Numerics):
    """The numerics of the linear layers `paths` of a decoder."""

    def __init__(self, recipe: Fp8Config, paths: Sequence[str], *, maxima: Maxima, device: torch.device) -> None:
        self.mode = Mode()
        self.paths = list(paths)
        self.maxima = maxima
        self.histories = (
            _histories(recipe, len(self.paths), device) if isinstance(recipe, DelayedScalingConfig) else None
        )
        self.rungs = RUNGS if self.histories is None else (FP8, BF16)
        self.recipe = recipe
        self.sharded = ShardedWeights(self._maximum_of_shards if recipe.shard_rows == 1 else None)

    def quantizers(self, path: str) -> Quantizers:
        """Those of one layer."""
        recipe, (forward, backward) = self.recipe, self.recipe.formats
        if self.histories is not None:
            first = 3 * self.paths.index(path)
            formats = (forward, forward, backward)
            return Quantizers(*(DelayedScaling(form, self.histories, first + i) for i, form in enumerate(formats)))
        if isinstance(recipe, CurrentScalingConfig):
            over = self.maxima if recipe.amax == "global" else Maxima()
            reduces = ((forward, over.activations), (forward, over.weights), (backward, over.activations))
            return Quantizers(*(CurrentScaling(form, recipe.power_2_scales, reduce) for form, reduce in reduces))
        if isinstance(recipe, BlockScalingConfig):
            powers = recipe.power_2_scales
            return Quantizers(
                TileScaling(forward, powers), BlockScaling(forward, powers), TileScaling(backward, powers)
            )
        assert isinstance(recipe, MXScalingConfig), f"{recipe.name} has no quantizers"
        return Quantizers(MXScaling(forward), MXScaling(forward), MXScaling(backward))

    @property
    def rung(self) -> str:
        """How the products are computed now: one of `rungs`. Setting another raises ValueError."""
        return self.mode.rung

    @rung.setter
    def rung(self, rung: str) -> None:
        if rung not in self.rungs:
            raise ValueError(
                f"precision={self.recipe.name} has no rung {rung!r}; choose one of {', '.join(self.rungs)}"
            )
        if rung != FP8 and self.gathered:
            raise ValueError(
                f"precision.all_gather=fp8 leaves no bf16 weights to compute in {rung} with, which this run had come to; set "
                "precision.all_gather=bf16"
            )
        self.mode.rung = rung

    @contextmanager
    def step(self, *, keep_weights: bool) -> Iterator[None]:
        """See `Numerics`."""
        self.mode.weights = {} if keep_weights else None
        self.sharded.changed()
        try:
            yield
        finally:
            self.mode.weights = None
            self.sharded.changed()

    @contextmanager
    def forward_only(self) -> Iterator[None]:
        """See `Numerics`."""
        self.sharded.changed()  # by a checkpoint that was loaded
        yield

    @property
    def gathered(self) -> Sequence[str]:
        """See `Numerics`."""
        return self.paths if self.recipe.all_gather == "fp8" else []

    def gather(self, path: str, shard: Tensor, *, rows: int, ranks: int) -> None:
        """See `Numerics`."""
        check_rows(path, rows, ranks=ranks, multiple=self.recipe.shard_rows)
        self.sharded.add(shard, self.quantizers(path).weight)

    def _maximum_of_shards(self, amax: Tensor) -> Tensor:
        over_tp = self.maxima.weights if getattr(self.recipe, "amax", "local") == "global" else None
        for reduce in (self.maxima.gathered, over_tp):
            amax = amax if reduce is None else reduce(amax)
        return amax

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """See `Numerics`."""
        if self.histories is None or self.rung == BF16:  # nothing is quantized: a history would fill with zeros
            yield
            return
        self.histories.recording = True
        try:
            yield
        finally:
            self.histories.recording = False
        self.histories.advance(self.maxima.activations)

    @contextmanager
    def collect(self, observe: Callable[[Observation], None]) -> Iterator[None]:
        """See `Numerics`."""
        self.mode.observe = observe
        try:
            yield
        finally:
            self.mode.observe = None

    def tensors(self) -> dict[str, Tensor]:
        """See `Numerics`."""
        if self.histories is None:
            return {}
        found = {}
        for index, path in enumerate(self.paths):
            for direction, columns in (
                ("fwd", slice(3 * index, 3 * index + 2)),
                ("bwd", slice(3 * index + 2, 3 * index + 3)),
            ):
                found[f"scale_{direction}.{path}"] = self.histories.scale[columns]
                found[f"amax_history_{direction}.{path}"] = self.histories.amax_history[:, columns]
        return found


def _histories(recipe: DelayedScalingConfig, layers: int, device: torch.device) -> Histories:
    forward, backward = recipe.formats
    return Histories(
        [forward, forward, backward] * layers,
        length=recipe.amax_history_len,
        margin=recipe.margin,
        amax_compute=recipe.amax_compute,
        device=device,
    )
