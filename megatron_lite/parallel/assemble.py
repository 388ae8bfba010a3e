"""From a model's config to this process's part of the model, allocated and initialized: all steps in order.

    decoder = Decoder(config)            on the meta device: shapes, no memory
    parallelize(decoder, ...)            FP8 layers, the tensor-parallel plan, then recompute and compile each layer
    shards = shard_info(decoder)         what this process holds of each global parameter
    module = wrap(decoder)               the objective around it, if there is one
    distribute(module, materialize)      the engine shards over the data-parallel ranks, memory and values come in between

Training, evaluation, generation, `megatron_lite.load` and weights-only starts all make this call, with different `fill`
functions. A fill gets one shard at a time and reads or draws only that shard, so no process ever holds, or reads, more than
its part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import nn

from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.initialization import Distribution, initialize_region_
from megatron_lite.narrowing import narrow
from megatron_lite.parallel.global_view import Layout, Piece
from megatron_lite.parallel.layers import ShardInfo, shard_info
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parallelize import Recipe, parallelize
from megatron_lite.parallel.sharded import is_sharded, local_shard
from megatron_lite.tensor_files import TensorSource

M = TypeVar("M", bound=nn.Module)


class Fill(Protocol):
    """Where values come from."""

    def __call__(self, name: str, shard: Piece, initial: Distribution) -> None:
        """Write the values of `shard` of the global parameter `name` into `shard.local`. initial: what it is drawn from."""


def seeded(seed: int) -> Fill:
    """Initial weights: they depend on the seed, the name and the global row, so every layout starts from the same bits."""

    def fill(name: str, shard: Piece, initial: Distribution) -> None:
        initialize_region_(
            shard.tensor(),
            distribution=initial,
            name=name,
            seed=seed,
            global_shape=shard.global_shape,
            starts=shard.offsets,
        )

    return fill


def from_tensors(source: TensorSource) -> Fill:
    """The values that `source` holds under the same names and shapes; only the shard's slice is read."""

    def fill(name: str, shard: Piece, initial: Distribution) -> None:
        local = shard.tensor()
        local.copy_(narrow(name, source.read(name, shard.offsets, tuple(local.shape)), local.dtype))

    return fill


@dataclass(frozen=True)
class Materialize:
    """Gives a part of the decoder its memory on `device` and its values. Each part goes through it once.

    A parameter that is a DTensor was sharded before and holds this rank's rows only; any other holds all rows.
    """

    decoder: Decoder
    shards: dict[str, ShardInfo]
    layout: Layout
    device: torch.device
    fill: Fill

    @torch.no_grad()
    def __call__(self, part: nn.Module) -> None:
        """part: the decoder, something around it, or one of its submodules."""
        part.to_empty(device=self.device)
        inside = set(part.modules())
        for path, module in self.decoder.named_modules():
            if module not in inside:
                continue
            initial: dict[str, Distribution] = module.initial() if hasattr(module, "initial") else {}
            missed = {name for name, _ in module.named_parameters(recurse=False)} - initial.keys()
            assert not missed, f"{path} does not say how to initialize {sorted(missed)}"
            for name, distribution in initial.items():
                self._fill(f"{path}.{name}", module.get_parameter(name), distribution)

    def _fill(self, name: str, parameter: nn.Parameter, initial: Distribution) -> None:
        info = self.shards[name]
        piece = self.layout.piece(
            local_shard(parameter), info.global_shape, tp_dim=info.tp_dim, dp_sharded=is_sharded(parameter)
        )
        self.fill(name, piece, initial)


Distribute = Callable[[nn.Module, Materialize], None]
"""How an engine divides a module over the data-parallel ranks; it calls `materialize` for every part of the decoder once,
before or after it has sharded that part."""


def undivided(module: nn.Module, materialize: Materialize) -> None:
    """The `Distribute` that leaves a whole tensor-parallel shard on every rank."""
    materialize(module)


def bare(decoder: Decoder) -> Decoder:
    """The `wrap` that wraps nothing."""
    return decoder


def assemble(
    config: ModelConfig,
    *,
    mesh: Mesh,
    recipe: Recipe,
    fill: Fill,
    wrap: Callable[[Decoder], M],
    distribute: Distribute = undivided,
) -> tuple[M, dict[str, ShardInfo]]:
    """What `wrap` makes of this process's part of the model, and for every parameter of the decoder what that part is.

    Raises ValueError when the model does not divide by the tensor-parallel degree or the precision cannot be had, and what `fill` raises.
    """
    with torch.device("meta"):
        decoder = Decoder(config)
    parallelize(decoder, mesh, recipe)
    shards = shard_info(decoder)
    module = wrap(decoder)
    distribute(module, Materialize(decoder, shards, mesh.layout, mesh.device, fill))
    missed = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    assert not missed, f"not materialized: {missed}"
    return module, shards
