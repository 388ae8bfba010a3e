"""Search for the sizes of a pruned model under a budget of parameters, or of memory with the cache of a context.

The sizes of the searched axes form a grid; for each of its points the last axis is made as large as the budget allows, so all candidates
cost about the same. They are ordered by the share of the importance that they keep, which costs nothing, and the best few of them by the
loss of the pruned model, which the caller measures.

Parameters are counted, and caches are made as generation makes them, on the meta device, of one layer of each kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, product

import torch
from torch import nn

from megatron_lite.compress.axes import HIDDEN, layer_axes
from megatron_lite.compress.scores import ImportanceConfig, Scores
from megatron_lite.compress.sizes import CONFIG_KEYS, resized, unit_layers, unit_of
from megatron_lite.compress.target import TargetConfig, without_units
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.context import LayerContext
from megatron_lite.models.decoder import residual_layer
from megatron_lite.models.flops import parameter_count
from megatron_lite.models.layers import LAYER_TYPES, layer_specs
from megatron_lite.models.pattern import LayerSpec

DEPTH = "num_layers"
MOST_POINTS = 10_000  # of the grid
WEIGHT_BYTES = 2  # bf16, as models are served
ROUNDING = 1e-9  # 0.57 * 100 is a little less than 57


@dataclass
class BudgetConfig:
    """At most so many parameters, or GiB of memory: weights and cache of `batch` sequences of `context` tokens, in bf16.

    axes: sizes that are searched, of `sizes.CONFIG_KEYS` and num_layers; those that the target gives are not. steps: sizes of each.
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
        if wrong or not self.axes or len({*self.axes}) < len(self.axes):
            raise ValueError(f"budget.axes={self.axes}: choose from {', '.join(known)}, each at most once")
        points = self.steps ** (len(self.axes) - 1)
        if points > MOST_POINTS:
            raise ValueError(
                f"budget.steps={self.steps} for {len(self.axes)} budget.axes makes {points:,} sizes to compare, more than "
                f"{MOST_POINTS:,}; lower budget.steps, or give some of the sizes as the target"
            )

    def units_to_remove(self, config: ModelConfig) -> int:
        """The most units that a candidate lacks."""
        return math.floor(self.max_depth * len(unit_layers(config)) + ROUNDING) if DEPTH in self.axes else 0


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
    order, costs, shares = (
        scores.removal_order(config, options),
        _Costs(config, budget),
        _Shares(scores, config, options),
    )
    found = [
        Candidate(sizes, layers, *costs.of(sizes, layers), shares.of(sizes, layers))
        for sizes, layers in _within(costs, order, target)
    ]
    if not found:
        raise _not_met(budget)
    return sorted(found, key=lambda candidate: -candidate.kept)[: budget.top_k]


def check_budget(config: ModelConfig, *, target: TargetConfig, budget: BudgetConfig) -> None:
    """Raises ValueError for a budget that no size meets, not even if the layers that cost most are removed first."""
    costs, sizes, units = _Costs(config, budget), target.sizes(config), unit_layers(config)

    def cost(unit: int) -> int:
        parameters, cache = costs.of(sizes, units[unit])
        return parameters if budget.memory_gib is None else parameters * WEIGHT_BYTES + cache

    if next(_within(costs, sorted(range(len(units)), key=cost, reverse=True), target), None) is None:
        raise _not_met(budget)


def _not_met(budget: BudgetConfig) -> ValueError:
    limit = f"parameters={budget.parameters}" if budget.memory_gib is None else f"memory_gib={budget.memory_gib}"
    return ValueError(
        f"budget.{limit} is not met by any size within budget.max_width={budget.max_width} and budget.max_depth={budget.max_depth}; "
        f"raise one of them, or search more axes (budget.axes={budget.axes})"
    )


def _within(costs: _Costs, order: list[int], target: TargetConfig) -> Iterator[tuple[dict[str, int], tuple[int, ...]]]:
    """(sizes, layers) of each point of the grid, its last axis as large as the budget allows."""
    config, budget = costs.config, costs.budget
    fixed = target.sizes(config)
    axes = [axis for axis in budget.axes if axis in fixed and getattr(target, axis) is None]
    if not axes:  # the number of layers is the last axis
        if not _searches_depth(target, budget):
            raise ValueError(f"budget.axes={budget.axes}: there is nothing to search, for the target gives these sizes")
        depths = (without_units(config, order, count) for count in range(budget.units_to_remove(config) + 1))
        yield from islice(((fixed, layers) for layers in depths if costs.fits(fixed, layers)), 1)
        return
    *grid, last = axes
    values = {axis: _values(fixed[axis], axis, unit_of(config, axis), budget) for axis in axes}
    tried = [values[axis][:: -_stride(values[axis], budget)] for axis in grid]
    for layers in _depths(config, order, target, budget):
        for point in product(*tried):
            sizes = fixed | dict(zip(grid, point))

            def fits(value: int, sizes: dict[str, int] = sizes, layers: tuple[int, ...] = layers) -> bool:
                return costs.fits(sizes | {last: value}, layers)

            best = _largest(values[last], fits)
            if best is not None:
                yield sizes | {last: best}, layers


def _searches_depth(target: TargetConfig, budget: BudgetConfig) -> bool:
    given = target.num_layers is not None or target.pattern is not None or target.layers is not None
    return DEPTH in budget.axes and not given


def _depths(
    config: ModelConfig, order: list[int], target: TargetConfig, budget: BudgetConfig
) -> Iterator[tuple[int, ...]]:
    if not _searches_depth(target, budget):
        yield target.layers_of(config, order)
        return
    most = budget.units_to_remove(config)
    for removed in sorted({most * step // max(budget.steps - 1, 1) for step in range(budget.steps)}):
        yield without_units(config, order, removed)


def _values(whole: int, axis: str, unit: int, budget: BudgetConfig) -> list[int]:
    """The sizes that an axis may have, ascending: multiples of about a sixteenth or less of the whole, or of what groups need."""
    step = unit
    while step * 2 * 16 <= whole and step < 256 and axis in (HIDDEN, "ffn_size"):
        step *= 2
    least = math.ceil(((1 - budget.max_width) * whole - ROUNDING) / step) * step
    return [*range(max(least, step), whole, step), whole]


def _stride(values: list[int], budget: BudgetConfig) -> int:
    """Every how many of the values of an axis are tried, from the largest down."""
    return max(1, -(-len(values) // budget.steps))


def _largest(values: list[int], fits: Callable[[int], bool]) -> int | None:
    low, high = 0, len(values)  # the first `low` fit
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(values[middle]) else (low, middle)
    return values[low - 1] if low else None


class _Costs:
    """What models cost. A layer costs the same in all models that give its axes and the residual stream the same sizes."""

    def __init__(self, config: ModelConfig, budget: BudgetConfig) -> None:
        self.config, self.budget = config, budget
        self._axes = dict(zip(config.symbols, (row.axes for row in layer_axes(config))))
        self._parameters: dict[tuple[object, ...], int] = {}
        self._caches: dict[tuple[object, ...], int] = {}
        self._outside: dict[int, int] = {}  # hidden size -> parameters outside of the layers

    def of(self, sizes: Mapping[str, int], layers: tuple[int, ...]) -> tuple[int, int]:
        """(parameters, bytes of the cache)."""
        made = resized(self.config, sizes, layers)
        costs = [self._of_layer(made, spec, sizes) for spec in layer_specs(made)]
        parameters, cache = (sum(of_all) for of_all in zip(*costs))
        if made.hidden_size not in self._outside:
            self._outside[made.hidden_size] = parameter_count(made) - parameters
        return parameters + self._outside[made.hidden_size], cache

    def fits(self, sizes: Mapping[str, int], layers: tuple[int, ...]) -> bool:
        """Whether they are within the budget."""
        parameters, cache = self.of(sizes, layers)
        if self.budget.memory_gib is None:
            return parameters <= (self.budget.parameters or 0)
        return parameters * WEIGHT_BYTES + cache <= self.budget.memory_gib * 2**30

    def _of_layer(self, config: ModelConfig, spec: LayerSpec, sizes: Mapping[str, int]) -> tuple[int, int]:
        inner = spec, *(sizes[axis] for axis in self._axes[spec.symbol])  # no cache depends on the width of the stream
        key = config.hidden_size, *inner
        if key not in self._parameters:
            with torch.device("meta"):
                layer = residual_layer(config, spec)
            self._parameters[key] = sum(parameter.numel() for parameter in layer.parameters())
            if inner not in self._caches:
                context, batch = self.budget.context, self.budget.batch
                self._caches[inner] = layer_cache_bytes(layer.mixer, config, spec, context=context, batch=batch)
        return self._parameters[key], self._caches[inner]


@torch.no_grad()
def layer_cache_bytes(mixer: nn.Module, config: ModelConfig, spec: LayerSpec, *, context: int, batch: int) -> int:
    """Bytes of keys, values and states that a mixer on the meta device, without meta tokens and another layer's keys, keeps in bf16 for
    `batch` sequences of `context` tokens: it reads one token, and caches allocate all that they will ever hold."""
    cache = LAYER_TYPES[spec.symbol].cache(config, spec, context)
    if cache is None:
        return 0
    with torch.device("meta"):
        x_BTD = torch.zeros(batch, 1, config.hidden_size, dtype=torch.bfloat16)
        mixer.bfloat16()(x_BTD, LayerContext(torch.zeros(1, 1, dtype=torch.int64), cache=cache))
    return cache.nbytes()


class _Shares:
    """The share of the importance that a model keeps: the product of those of depth, hidden channels and, on average, mixers."""

    def __init__(self, scores: Scores, config: ModelConfig, options: ImportanceConfig) -> None:
        self.config, self.rows = config, layer_axes(config)
        self.hidden = scores.hidden(config, options).sort(descending=True).values
        depth = scores.depth()
        self.depth = {
            layer: float(depth[unit]) for unit, layers in enumerate(unit_layers(config)) for layer in layers[:1]
        }
        self.roots = [scores.root(f"layers.{layer}.mixer", options.batch) for layer in range(len(self.rows))]
        self._mixers: dict[tuple[int, ...], float] = {}

    def of(self, sizes: Mapping[str, int], layers: tuple[int, ...]) -> float:
        """Between 0 and 1."""
        whole = max(sum(self.depth.values()), 1e-30)  # 0 where no layer changes its input
        of_depth = sum(self.depth.get(layer, 0.0) for layer in layers) / whole
        of_hidden = float(self.hidden[: sizes[HIDDEN]].sum() / self.hidden.sum())
        return of_depth * of_hidden * sum(self._of_mixer(layer, sizes) for layer in layers) / len(layers)

    def _of_mixer(self, layer: int, sizes: Mapping[str, int]) -> float:
        row, roots = self.rows[layer], self.roots[layer]
        key = layer, *(sizes[axis] for axis in row.axes)
        if key not in self._mixers:
            kept = row.rows(self.config, row.kept(roots, self.config, sizes))[row.inner].keep
            self._mixers[key] = float(roots[kept].sum() / roots.sum().clamp(min=1e-30))
        return self._mixers[key]
