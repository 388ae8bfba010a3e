"""Cutting a model: the tensors of the pruned one as a `TensorSource` over those of its source, read when they are asked for.

Nothing is cut in advance: `assemble` builds the pruned model at any layout from this source, each rank reading its own rows, and a
checkpoint is written from it tensor by tensor. A read takes blocks of consecutive rows of the source and keeps of them what stays, so a
tensor costs its own kept size and one block.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.compress.axes import HIDDEN, RESIDUAL, KeptSets, Rows, layer_axes
from megatron_lite.compress.sizes import resized
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.huggingface import expected_shapes
from megatron_lite.tensor_files import TensorSource

BLOCK_BYTES = 2**24  # of rows of the source that are read at a time


@dataclass(frozen=True)
class Selection:
    """What stays of a model. layers: residual layers, ascending. hidden: channels of the residual stream. inner: kept layer -> axis ->
    kept numbers (see `axes`)."""

    layers: tuple[int, ...]
    hidden: Tensor
    inner: Mapping[int, KeptSets]

    def config(self, source: ModelConfig) -> ModelConfig:
        """The config of the pruned model."""
        sizes = {HIDDEN: len(self.hidden)}
        for kept in self.inner.values():
            sizes |= {axis: len(numbers) for axis, numbers in kept.items() if axis != RESIDUAL}
        return resized(source, sizes, self.layers)


class PrunedTensors:
    """The tensors of the pruned model under its own names: see `tensor_files.TensorSource`.

    config: of the source. head_residual: add the residual of pruned query heads to the kept ones (arXiv 2407.14679, section 2.2).
    Raises ValueError for a parameter that no row of `axes.MIXERS` knows.
    """

    def __init__(
        self, source: TensorSource, config: ModelConfig, selection: Selection, *, head_residual: bool = False
    ) -> None:
        self.source = source
        self.config = selection.config(config)
        self._parameters = _parameters(source, config, selection, head_residual=head_residual)
        expected = {name: tuple(shape) for name, shape in expected_shapes(self.config).items()}
        made = {name: self.shape(name) for name in self._parameters}
        assert made == expected, sorted(made.items() ^ expected.items())

    def names(self) -> Collection[str]:
        """See `TensorSource`."""
        return self._parameters.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource`."""
        return tuple(len(rows.keep) for rows in self._parameters[name][1])

    def dtype(self, name: str) -> torch.dtype:
        """See `TensorSource`."""
        return self.source.dtype(self._parameters[name][0])

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """See `TensorSource`."""
        original, dims = self._parameters[name]
        wanted = [slice(start, start + size) for start, size in zip(offsets, sizes)]
        numbers = [rows.keep[part] for rows, part in zip(dims, wanted)]
        tensor = self._take(original, numbers)
        if dims[0].minus is not None:
            minus = dims[0].minus[wanted[0]]
            has_one = minus >= 0
            other = self._take(original, [minus[has_one], *numbers[1:]])
            tensor[has_one] = (2 * tensor[has_one].float() - other.float()).to(tensor.dtype)
        return tensor

    def _take(self, name: str, numbers: list[Tensor]) -> Tensor:
        """The elements of a tensor of the source at these numbers of every dimension; only those of dimension 0 may be out of order."""
        made = torch.empty([len(of_dim) for of_dim in numbers], dtype=self.source.dtype(name))
        if not made.numel():
            return made
        rows, order = numbers[0].sort()
        starts = [int(of_dim[0]) for of_dim in numbers[1:]]
        spans = [int(of_dim[-1]) + 1 - start for of_dim, start in zip(numbers[1:], starts)]
        step = max(1, BLOCK_BYTES // (math.prod(spans) * made.element_size()))
        ends = torch.searchsorted(rows, torch.arange(int(rows[0]) + step, int(rows[-1]) + 1 + step, step)).tolist()
        for low, high in zip([0, *ends], ends):
            here = rows[low:high]
            if not len(here):
                continue
            base, count = int(here[0]), int(here[-1] - here[0]) + 1
            block = self.source.read(name, (base, *starts), (count, *spans))
            block = _select(block, 0, here - base)
            for dim, (of_dim, begin) in enumerate(zip(numbers[1:], starts), 1):
                block = _select(block, dim, of_dim - begin)
            made[order[low:high]] = block
        return made


class KeptScales:
    """The scales of delayed scaling of the layers that stay, under their new numbers: see `tensor_files.TensorSource`.

    A scale belongs to a whole tensor. No element of a part is larger than the largest of the whole, so the scale of a weight fits what
    stays of it, and is at most finer than needed; that of an input follows in training, as it does when weights change.
    """

    def __init__(self, source: TensorSource, layers: Sequence[int]) -> None:
        self.source = source
        self._originals = {}
        for name in source.names():
            _, number, rest = name.split(".", 2)
            if int(number) in layers:
                self._originals[f"layers.{layers.index(int(number))}.{rest}"] = name

    def names(self) -> Collection[str]:
        """See `TensorSource`."""
        return self._originals.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource`."""
        return self.source.shape(self._originals[name])

    def dtype(self, name: str) -> torch.dtype:
        """See `TensorSource`."""
        return self.source.dtype(self._originals[name])

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """See `TensorSource`."""
        return self.source.read(self._originals[name], offsets, sizes)


def _select(block: Tensor, dim: int, numbers: Tensor) -> Tensor:
    return block if len(numbers) == block.shape[dim] else block.index_select(dim, numbers)


def _parameters(
    source: TensorSource, config: ModelConfig, selection: Selection, *, head_residual: bool
) -> dict[str, tuple[str, tuple[Rows, ...]]]:
    """Name in the pruned model -> (name in the source, what stays of each dimension)."""
    axes = layer_axes(config)
    hidden = {HIDDEN: Rows(selection.hidden)}
    found = {}
    for name in source.names():
        rows, place = hidden, name
        dims: tuple[str | None, ...] | None = (HIDDEN,)  # norms
        if name in ("embedding.weight", "head.weight"):
            dims = (None, HIDDEN)
        elif name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            layer = int(number)
            if layer not in selection.layers:
                continue
            place = f"layers.{selection.layers.index(layer)}.{rest}"
            if rest.startswith("mixer."):
                dims = axes[layer].dims.get(rest.removeprefix("mixer."))
                kept = {
                    axis: numbers
                    for axis, numbers in selection.inner[layer].items()
                    if axis != RESIDUAL or head_residual
                }
                rows = hidden | axes[layer].rows(config, kept)
        elif not name.startswith("final_norm."):
            dims = None
        if dims is None:
            raise ValueError(f"{name} cannot be pruned: compress/axes.py does not say what its dimensions are")
        shape = source.shape(name)
        found[place] = name, tuple(rows[dim] if dim else Rows(torch.arange(n)) for dim, n in zip(dims, shape))
    return found
