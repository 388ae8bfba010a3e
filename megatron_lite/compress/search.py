"""Search for the sizes of a pruned model under a budget of parameters, or of memory with the cache of a context.

The sizes of the searched axes form a grid; for each of its points the last axis is made as large as the budget allows, so all candidates
cost about the same. They are ordered by the share of the importance that they keep, which costs nothing, and the best few of them by the
loss of the pruned model, which the caller measures.

Parameters are counted on the meta device by `parameter_count`; the cache is the one that generation makes, on the meta device too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product

import torch

from megatron_lite.compress.axes import CONFIG_KEYS, HIDDEN, layer_axes, resized, sizes_of, unit_layers, unit_of
from megatron_lite.compress.scores import ImportanceConfig, Scores
from megatron_lite.compress.surgery import Selection
from megatron_lite.compress.target import TargetConfig, without_units
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.flops import parameter_count

DEPTH = "num_layers"
WEIGHT_BYTES = 2  # bf16, as models are served


@dataclass
class BudgetConfig:
    """At most so many parameters, or GiB of memory: weights and cache of `batch` sequences of `context` tokens, in bf16.

    axes: sizes that are searched, of `axes.CONFIG_KEYS` and num_layers; those that the target gives are not. steps: sizes of each.
    max_width, max_depth: the largest share of a size, and of the layers, that is cut. top_k: candidates whose loss is measured, on
    `windows` held-out windows.
    """

    parameters: int | None = None
    memory_gib: float | None = None
    context: int = 131072
    batch: int = 1
    axes: list[str] = field(default_factory=lambda: [DEPTH, HIDDEN, "ffn_size"])
    steps: int = 5
    max_width: float = 0.4
    max_depth: float = 0.2
    top_k: int = 8
    windows: int = 64

    @property
    def is_given(self) -> bool:
        """Whether a search is asked for."""
        return self.parameters is not None or self.memory_gib is not None

    def validate(self) -> None:
        """Raises ValueError naming the key."""
        if self.parameters is not None and self.memory_gib is not None:
            raise ValueError("budget.parameters and budget.memory_gib exclude each other; give one of them")
        for key in ("parameters", "context", "batch", "steps", "top_k", "windows"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"budget.{key}={value} must be at least 1")
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise ValueError(f"budget.memory_gib={self.memory_gib} must be above 0")
        for key in ("max_width", "max_depth"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"budget.{key}={getattr(self, key)} must be at least 0 and below 1")
        known = (DEPTH, *CONFIG_KEYS)
        wrong = [axis for axis in self.axes if axis not in known]
        if wrong or not self.axes:
            raise ValueError(f"budget.axes={self.axes}: choose from {', '.join(known)}")

    def units_to_remove(self, config: ModelConfig) -> int:
        """The most units that a candidate lacks."""
        return int(self.max_depth * len(unit_layers(config))) if DEPTH in self.axes else 0


@dataclass(frozen=True)
class Candidate:
    """sizes and layers: as `Scores.select` takes them. cache: bytes. kept: share of the importance."""

    sizes: Mapping[str, int]
    layers: tuple[int, ...]
    parameters: int
    cache: int
    kept: float


def candidates(
    config: ModelConfig, scores: Scores, options: ImportanceConfig, *, target: TargetConfig, budget: BudgetConfig
) -> list[Candidate]:
    """The candidates within the budget, from the one that keeps the most importance on, at most `top_k`.

    Raises ValueError where none fits.
    """
    order, costs = scores.removal_order(config, options), _Costs(config, budget)
    found = []
    for sizes, layers in _within(costs, order, target):
        kept = kept_share(scores, config, scores.select(config, sizes, layers, options), options)
        parameters = parameter_count(resized(config, sizes, layers))
        found.append(Candidate(sizes, layers, parameters, costs.cache(sizes, layers), kept))
    if not found:
        limit = f"parameters={budget.parameters}" if budget.memory_gib is None else f"memory_gib={budget.memory_gib}"
        raise ValueError(
            f"budget.{limit} is not met by any size within budget.max_width={budget.max_width} and budget.max_depth="
            f"{budget.max_depth}; raise one of them, or search more axes (budget.axes={budget.axes})"
        )
    return sorted(found, key=lambda candidate: -candidate.kept)[: budget.top_k]


def _within(costs: _Costs, order: list[int], target: TargetConfig) -> Iterator[tuple[dict[str, int], tuple[int, ...]]]:
    """(sizes, layers) of each point of the grid, its last axis as large as the budget allows."""
    config, budget = costs.config, costs.budget
    fixed = target.sizes(config)
    axes = [axis for axis in budget.axes if axis in fixed and getattr(target, axis) is None]
    if not axes:
        raise ValueError(f"budget.axes={budget.axes}: there is nothing to search, for the target gives these sizes")
    *grid, last = axes
    for layers in _depths(config, order, target, budget):
        for point in product(*(_values(config, axis, budget)[:: -_stride(config, axis, budget)] for axis in grid)):
            sizes = fixed | dict(zip(grid, point))

            def fits(value: int, sizes: dict[str, int] = sizes, layers: tuple[int, ...] = layers) -> bool:
                return costs.fits(sizes | {last: value}, layers)

            best = _largest(_values(config, last, budget), fits)
            if best is not None:
                yield sizes | {last: best}, layers


def _depths(
    config: ModelConfig, order: list[int], target: TargetConfig, budget: BudgetConfig
) -> Iterator[tuple[int, ...]]:
    given = target.num_layers is not None or target.pattern is not None or target.layers is not None
    if given or DEPTH not in budget.axes:
        yield target.layers_of(config, order)
        return
    most = budget.units_to_remove(config)
    for removed in sorted({most * step // max(budget.steps - 1, 1) for step in range(budget.steps)}):
        yield without_units(config, order, removed)


def _values(config: ModelConfig, axis: str, budget: BudgetConfig) -> list[int]:
    """The sizes that an axis may have, ascending: multiples of about a sixteenth or less of the whole, or of what groups need."""
    whole = sizes_of(config)[axis]
    step = unit_of(config, axis)
    while step * 2 * 16 <= whole and step < 256 and axis in (HIDDEN, "ffn_size"):
        step *= 2
    least = -(-int((1 - budget.max_width) * whole) // step) * step
    return [*range(max(least, step), whole, step), whole]


def _stride(config: ModelConfig, axis: str, budget: BudgetConfig) -> int:
    """Every how many of the values of an axis are tried, from the largest down."""
    return max(1, -(-len(_values(config, axis, budget)) // budget.steps))


def _largest(values: list[int], fits: Callable[[int], bool]) -> int | None:
    low, high = 0, len(values)  # the first `low` fit
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(values[middle]) else (low, middle)
    return values[low - 1] if low else None


class _Costs:
    """What models cost. The cache of a layer depends neither on the width of the residual stream nor on that of the feed-forward layers, so
    it is made once for all candidates that differ in them only."""

    def __init__(self, config: ModelConfig, budget: BudgetConfig) -> None:
        self.config, self.budget = config, budget
        self._caches: dict[tuple[object, ...], int] = {}

    def cache(self, sizes: Mapping[str, int], layers: tuple[int, ...]) -> int:
        """Bytes of the cache."""
        key = (layers, *(item for item in sorted(sizes.items()) if item[0] not in (HIDDEN, "ffn_size")))
        if key not in self._caches:
            made = resized(self.config, sizes, layers)
            self._caches[key] = cache_bytes(made, context=self.budget.context, batch=self.budget.batch)
        return self._caches[key]

    def fits(self, sizes: Mapping[str, int], layers: tuple[int, ...]) -> bool:
        """Whether they are within the budget."""
        parameters = parameter_count(resized(self.config, sizes, layers))
        if self.budget.memory_gib is None:
            return parameters <= (self.budget.parameters or 0)
        return parameters * WEIGHT_BYTES + self.cache(sizes, layers) <= self.budget.memory_gib * 2**30


@torch.no_grad()
def cache_bytes(config: ModelConfig, *, context: int, batch: int) -> int:
    """Bytes of keys, values and states that generation keeps in bf16 for `batch` sequences of `context` tokens."""
    with torch.device("meta"):
        decoder = Decoder(config).bfloat16()
        cache = decoder.new_cache(context)
        decoder.hidden(torch.zeros(batch, 1, dtype=torch.int64), cache=cache)
    return cache.nbytes()


def kept_share(scores: Scores, config: ModelConfig, selection: Selection, options: ImportanceConfig) -> float:
    """The share of the importance that a selection keeps: the product of those of depth, hidden channels and, on average, mixers."""
    hidden, depth = scores.hidden(config, options), scores.depth()
    rows = layer_axes(config)
    mixers = []
    for layer in selection.layers:
        roots = scores.root(f"layers.{layer}.mixer", options.batch)
        channels = rows[layer].rows(config, selection.inner[layer])[rows[layer].inner].keep
        mixers.append(float(roots[channels].sum() / roots.sum().clamp(min=1e-30)))
    units = [unit for unit, layers in enumerate(unit_layers(config)) if layers[0] in selection.layers]
    of_depth = float(depth[units].sum() / depth.sum())
    return of_depth * float(hidden[selection.hidden].sum() / hidden.sum()) * sum(mixers) / len(mixers)
