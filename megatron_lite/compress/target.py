"""What a model is pruned to: sizes that are given, and the layers that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_lite.compress.axes import HIDDEN
from megatron_lite.compress.sizes import CONFIG_KEYS, sizes_of, unit_layers, unit_of
from megatron_lite.models.config import ModelConfig

ALIGNMENT = 16  # numbers that tensor cores multiply at once


@dataclass
class TargetConfig:
    """Sizes of the pruned model; null: as they are.

    heads: query heads; mamba_heads, mamba_head_dim: of the Mamba-2 layers. num_layers: transformer blocks, of a model with a pattern its
    residual layers; the least important ones go. pattern: the layers that stay, by their symbols, of a model with a pattern: of all
    ways to delete layers that leave it the one that keeps the most important layers is taken. layers: the residual layers that stay,
    by number from 0.
    """

    hidden_size: int | None = None
    ffn_size: int | None = None
    heads: int | None = None
    mamba_heads: int | None = None
    mamba_head_dim: int | None = None
    num_layers: int | None = None
    pattern: str | None = None
    layers: list[int] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is given."""
        return all(getattr(self, field.name) is None for field in fields(self))

    def sizes(self, config: ModelConfig) -> dict[str, int]:
        """axis -> size of the pruned model. Raises ValueError naming the key whose value the model cannot have."""
        known = sizes_of(config)
        for axis in CONFIG_KEYS:
            given = getattr(self, axis)
            if given is None:
                continue
            if axis not in known:
                raise ValueError(f"target.{axis}={given}: this model has no model.{CONFIG_KEYS[axis]}; drop it")
            if not 1 <= given <= known[axis]:
                raise ValueError(
                    f"target.{axis}={given} must be between 1 and the model's own {known[axis]} ({CONFIG_KEYS[axis]})"
                )
            unit = unit_of(config, axis)
            if given % unit:
                below, above = given // unit * unit, (given // unit + 1) * unit
                raise ValueError(
                    f"target.{axis}={given} must be a multiple of {unit}: each of the {unit} groups keeps equally many; "
                    f"{f'{below} or {above}' if below else above} would do"
                )
            known[axis] = given
        return known

    def kept_units(self, config: ModelConfig) -> int | None:
        """How many units stay by `num_layers`; None where it is not given. Raises ValueError for what the model does not have."""
        units = len(unit_layers(config))
        given = [name for name in ("num_layers", "pattern", "layers") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"target.{given[0]} and target.{given[1]} exclude each other; give one of them")
        if self.num_layers is not None and not 1 <= self.num_layers <= units:
            raise ValueError(f"target.num_layers={self.num_layers} must be between 1 and the model's own {units}")
        if self.pattern is not None and config.pattern is None:
            raise ValueError(
                f"target.pattern={self.pattern}: this model has no pattern but {units} equal blocks; give target.num_layers"
            )
        return self.num_layers

    def units_to_remove(self, config: ModelConfig) -> int:
        """How many units an iterative removal has to order."""
        units, kept = len(unit_layers(config)), self.kept_units(config)
        if self.pattern is not None:
            return units - 1
        return 0 if kept is None else units - kept

    def layers_of(self, config: ModelConfig, order: Sequence[int]) -> tuple[int, ...]:
        """The residual layers that stay. order: units from the least important one on, all or the first ones.

        Raises ValueError for layers that the model does not have.
        """
        kept = self.kept_units(config)
        if self.layers is not None:
            return _checked(self.layers, config)
        if self.pattern is not None:
            return embedded(self.pattern, config.symbols, order)
        return without_units(config, order, 0 if kept is None else len(unit_layers(config)) - kept)


def without_units(config: ModelConfig, order: Sequence[int], count: int) -> tuple[int, ...]:
    """The residual layers that are left when the first `count` units of `order` are removed."""
    assert count <= len(order) or not count, "the importance of too few layers is known"
    gone = set(order[:count])
    return tuple(layer for unit, layers in enumerate(unit_layers(config)) if unit not in gone for layer in layers)


def _checked(layers: Sequence[int], config: ModelConfig) -> tuple[int, ...]:
    count = len(config.symbols)
    if not layers or list(layers) != sorted({*layers}) or layers[0] < 0 or layers[-1] >= count:
        raise ValueError(
            f"target.layers={list(layers)} must be ascending numbers of residual layers, from 0 to {count - 1}"
        )
    for unit in unit_layers(config):
        if 0 < len({*unit} & {*layers}) < len(unit):
            raise ValueError(
                f"target.layers={list(layers)} cuts a block: layers {' and '.join(map(str, unit))} stay or go together"
            )
    return tuple(layers)


def embedded(pattern: str, symbols: str, order: Sequence[int]) -> tuple[int, ...]:
    """The layers of `symbols` that spell `pattern`, in order, chosen so that the least important ones are left out.

    order: layers from the least important one on; one that it does not have is more important than all that it has. The value of a
    choice is the sum of the places in that order. Raises ValueError where `symbols` does not have `pattern` in it.
    """
    wanted = pattern.replace("|", "")
    place = {layer: number for number, layer in enumerate(order, 1)}
    # best[j]: (value, layers) of the best way to spell the first j symbols with the layers so far
    best: list[tuple[int, tuple[int, ...]] | None] = [(0, ()), *[None] * len(wanted)]
    for layer, symbol in enumerate(symbols):
        for j in range(len(wanted), 0, -1):
            before = best[j - 1]
            if symbol == wanted[j - 1] and before is not None:
                made = before[0] + place.get(layer, len(symbols) + 1), (*before[1], layer)
                held = best[j]
                best[j] = made if held is None or made[0] > held[0] else held
    found = best[-1]
    if found is None or not wanted:
        raise ValueError(f"target.pattern={pattern} is not what is left when layers of {symbols} are deleted")
    return found[1]


def size_warnings(config: ModelConfig, *, tp: int) -> list[str]:
    """A line for each width of a matrix that tensor cores, on `tp` ranks, cannot divide evenly."""
    known = sizes_of(config)
    widths = {HIDDEN: known[HIDDEN]}
    if "ffn_size" in known:
        widths["ffn_size"] = known["ffn_size"]
    if "heads" in known:
        widths["heads x head_dim"] = known["heads"] * config.head_dim
    if "mamba_heads" in known:
        widths["mamba_heads x mamba_head_dim"] = known["mamba_heads"] * known["mamba_head_dim"]
    return [
        f"{width}={size} is not a multiple of {ALIGNMENT} x parallel.tp={tp}: matrix products will be slower"
        for width, size in widths.items()
        if size % (ALIGNMENT * tp)
    ]
