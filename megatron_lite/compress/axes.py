"""Which axes of a model can be pruned, and which dimension of which parameter belongs to which of them: one row for each mixer.

    axis             size in the config      kept sets
    hidden_size      hidden_size             one for the whole model: every layer writes to the same residual stream
    ffn_size         mlp.ffn_size            one for each feed-forward layer
    heads            attention.heads         one for each attention layer, equally many query heads of every key-value group
    mamba_heads      mamba.heads             one for each Mamba-2 layer, equally many of every group
    mamba_head_dim   mamba.head_dim          one for each Mamba-2 layer, the same for all its heads

A kept set is the ascending list of the numbers that stay. A row of `MIXERS` says what of a mixer is read to score it, how scores become
kept sets, and what the kept sets mean for every dimension of its parameters. Group-major rows (`attention.py`, `mamba.py`) are computed
here, so the surgery only takes rows and columns. A mixer without a row is refused by name.

Shapes: K kept numbers of an axis; of attention H heads, G groups, N head dim, V that of values; of Mamba-2 H heads, G groups, P head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_lite.models.attention import Attention
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import residual_layer
from megatron_lite.models.layers import layer_specs
from megatron_lite.models.mamba import Mamba2
from megatron_lite.models.mlp import MLP, GatedMLP

HIDDEN = "hidden_size"
RESIDUAL = "residual"  # beside "heads": for each kept head, the pruned head whose difference is added to its queries, -1 for none

KeptSets = Mapping[str, Tensor]  # axis -> (K,) int64


class Rows(NamedTuple):
    """The numbers along a dimension of the source that stay; minus: for each of them the number y whose values are used as well, as
    2 x - y, or -1. None: no number has one."""

    keep: Tensor
    minus: Tensor | None = None


@dataclass(frozen=True)
class MixerAxes:
    """axes: the axes that the mixer has. reads: (submodule, whether its output or its input is read) for the score, of which `channels`
    takes the part that counts, (B, T, all) -> (B, T, channels); channels are in the order of the global tensor, so that the parts of
    tensor-parallel ranks only have to be put side by side. width: how many there are.
    kept: (root of each channel, config, number to keep by axis) -> kept sets.
    rows: (config, kept sets) -> name -> what stays of the dimensions that `dims` gives this name.
    dims: parameter -> for each of its dimensions a name of `rows`, `HIDDEN`, or None where all of it stays. inner: the name of `rows`
    whose numbers are those of the channels.
    """

    axes: tuple[str, ...]
    reads: tuple[str, str]
    channels: Callable[[ModelConfig, Tensor], Tensor]
    width: Callable[[ModelConfig], int]
    kept: Callable[[Tensor, ModelConfig, Mapping[str, int]], dict[str, Tensor]]
    rows: Callable[[ModelConfig, KeptSets], dict[str, Rows]]
    dims: Mapping[str, tuple[str | None, ...]]
    inner: str


def largest(scores: Tensor, count: int) -> Tensor:
    """The numbers of the `count` largest scores along the last dimension, ascending; of equal ones the first. (..., n) -> (..., count)."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values


def _grouped(scores_GH: Tensor, count: int) -> Tensor:
    """The best count / G of each group, numbered through all groups: (G, H/G) -> (count,)."""
    groups, size = scores_GH.shape
    kept_GK = largest(scores_GH, count // groups)
    return (kept_GK + torch.arange(groups)[:, None] * size).flatten()


# ---- feed-forward


def _all(config: ModelConfig, x_BTC: Tensor) -> Tensor:
    return x_BTC


def _mlp_kept(roots_F: Tensor, config: ModelConfig, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    return {"ffn_size": largest(roots_F, sizes["ffn_size"])}


def _mlp_rows(config: ModelConfig, kept: KeptSets) -> dict[str, Rows]:
    return {"neurons": Rows(kept["ffn_size"])}


def _mlp(*projections: str) -> MixerAxes:
    dims: dict[str, tuple[str | None, ...]] = {"down.weight": (HIDDEN, "neurons"), "down.bias": (HIDDEN,)}
    for name in projections:
        dims |= {f"{name}.weight": ("neurons", HIDDEN), f"{name}.bias": ("neurons",)}
    return MixerAxes(
        ("ffn_size",),
        ("down", "input"),
        _all,
        lambda config: config.mlp.ffn_size,
        _mlp_kept,
        _mlp_rows,
        dims,
        "neurons",
    )


# ---- attention


def _head_scores(roots: Tensor, config: ModelConfig) -> Tensor:
    """(H V,) -> (G, H/G): the L2 norm over a head's channels."""
    return roots.view(config.attention.kv_heads, -1, config.value_head_dim).norm(dim=2)


def _attention_kept(roots: Tensor, config: ModelConfig, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    scores_GH = _head_scores(roots, config)
    kept = _grouped(scores_GH, sizes["heads"])
    return {"heads": kept, RESIDUAL: _partners(scores_GH, kept)}


def _partners(scores_GH: Tensor, kept: Tensor) -> Tensor:
    """For each kept head the pruned one that lends it its residual (arXiv 2407.14679, section 2.2): ranked by importance within a group,
    of K kept heads number i takes number 2 K - i + 1, so the last kept head takes the first pruned one. -1: none is left.
    """
    groups, size = scores_GH.shape
    count = len(kept) // groups
    order_GH = scores_GH.argsort(dim=1, descending=True, stable=True) + torch.arange(groups)[:, None] * size
    partner = torch.full((groups * size,), -1, dtype=torch.int64)
    for behind in range(min(count, size - count)):
        partner[order_GH[:, count - 1 - behind]] = order_GH[:, count + behind]
    return partner[kept]


def _attention_rows(config: ModelConfig, kept: KeptSets) -> dict[str, Rows]:
    heads, groups, width = kept["heads"], config.attention.kv_heads, config.head_dim
    queries, of_value = config.attention.heads // groups, torch.arange(config.value_head_dim)
    size = (queries + 1) * width + config.value_head_dim  # rows of a group in qkv
    channel = torch.arange(width)

    def query_rows(numbers: Tensor) -> Tensor:
        """(K,) heads -> (K, N) rows of qkv; -1 for -1."""
        first = numbers // queries * size + numbers % queries * width
        return torch.where(numbers[:, None] >= 0, first[:, None] + channel, -1)

    keys_and_values = torch.arange(queries * width, size) + torch.arange(groups)[:, None] * size
    qkv = torch.cat([query_rows(heads).view(groups, -1), keys_and_values], dim=1).flatten()
    partners, minus = kept.get(RESIDUAL), None
    if partners is not None and (partners >= 0).any():
        none = torch.full_like(keys_and_values, -1)
        minus = torch.cat([query_rows(partners).view(groups, -1), none], dim=1).flatten()
    return {"qkv": Rows(qkv, minus), "heads": Rows((heads[:, None] * len(of_value) + of_value).flatten())}


# ---- Mamba-2


def _mamba_channels(config: ModelConfig, y_BTR: Tensor) -> Tensor:
    """The rows of x in the output of `in_proj`, whole groups of [z x B C dt] -> (B, T, H P)."""
    mamba = config.mamba
    heads = mamba.heads // mamba.groups
    inner = heads * mamba.head_dim
    return y_BTR.unflatten(-1, (-1, 2 * inner + 2 * mamba.state + heads))[..., inner : 2 * inner].flatten(-2)


def _mamba_kept(roots: Tensor, config: ModelConfig, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Channels by their norm over all heads; heads by their norm over the kept channels, within their group."""
    roots_HP = roots.view(config.mamba.heads, config.mamba.head_dim)
    channels = largest(roots_HP.norm(dim=0), sizes["mamba_head_dim"])
    scores_GH = roots_HP[:, channels].norm(dim=1).view(config.mamba.groups, -1)
    return {"mamba_heads": _grouped(scores_GH, sizes["mamba_heads"]), "mamba_head_dim": channels}


def _mamba_rows(config: ModelConfig, kept: KeptSets) -> dict[str, Rows]:
    mamba = config.mamba
    per_group = mamba.heads // mamba.groups
    heads, channels = kept["mamba_heads"], kept["mamba_head_dim"]
    inner = per_group * mamba.head_dim
    values_GI = (heads[:, None] * mamba.head_dim + channels).view(mamba.groups, -1)  # channels of x, through all groups
    local_GI = values_GI - torch.arange(mamba.groups)[:, None] * inner
    heads_GH = heads.view(mamba.groups, -1) - torch.arange(mamba.groups)[:, None] * per_group
    states_GS = torch.arange(2 * mamba.state).expand(mamba.groups, -1)  # B and C stay whole

    def group_major(*parts: Tensor, size: int) -> Rows:
        """Rows of a tensor whose groups have `size` rows; parts: (G, n) numbers within a group."""
        numbers = torch.cat(parts, dim=1) + torch.arange(mamba.groups)[:, None] * size
        return Rows(numbers.flatten())

    end = 2 * inner + 2 * mamba.state  # of z, x, B and C: dt comes after them
    z_x_states = local_GI, local_GI + inner, states_GS + 2 * inner
    return {
        "in_proj": group_major(*z_x_states, heads_GH + end, size=end + per_group),
        "conv": group_major(local_GI, states_GS + inner, size=inner + 2 * mamba.state),
        "heads": Rows(heads),
        "inner": Rows(values_GI.flatten()),
    }


MIXERS: dict[type[nn.Module], MixerAxes] = {
    MLP: _mlp("up"),
    GatedMLP: _mlp("up", "gate"),
    Attention: MixerAxes(
        ("heads",),
        ("out", "input"),
        _all,
        lambda config: config.attention.heads * config.value_head_dim,
        _attention_kept,
        _attention_rows,
        {
            "qkv.weight": ("qkv", HIDDEN),
            "qkv.bias": ("qkv",),
            "out.weight": (HIDDEN, "heads"),
            "out.bias": (HIDDEN,),
        }
        # of a head's dimensions
        | {f"core.{norm}.{kind}": (None,) for norm in ("q_norm", "k_norm") for kind in ("weight", "bias")},
        "heads",
    ),
    Mamba2: MixerAxes(
        ("mamba_heads", "mamba_head_dim"),
        ("in_proj", "output"),
        _mamba_channels,
        lambda config: config.mamba.heads * config.mamba.head_dim,
        _mamba_kept,
        _mamba_rows,
        {
            "in_proj.weight": ("in_proj", HIDDEN),
            "in_proj.bias": ("in_proj",),
            "conv.weight": ("conv", None, None),
            "conv.bias": ("conv",),
            "ssm.A_log": ("heads",),
            "ssm.dt_bias": ("heads",),
            "ssm.D": ("heads",),
            "norm.weight": ("inner",),
            "out_proj.weight": (HIDDEN, "inner"),
            "out_proj.bias": (HIDDEN,),
        },
        "inner",
    ),
}


def mixer_axes(mixer: nn.Module, layer: int) -> MixerAxes:
    """The row of the mixer of residual layer number `layer`. Raises ValueError if it has none."""
    for kind in type(mixer).__mro__:  # an engine may have made a subclass of it
        if kind in MIXERS:
            return MIXERS[kind]
    known = ", ".join(kind.__name__ for kind in MIXERS)
    raise ValueError(
        f"layer {layer} is a {type(mixer).__name__}, which cannot be pruned; of the layer types of a pattern these can: {known}"
    )


def layer_axes(config: ModelConfig) -> list[MixerAxes]:
    """The row of each residual layer's mixer. Raises ValueError for a model that has a layer without one, or parts that no row covers."""
    config.validate()
    with torch.device("meta"):  # one mixer of each symbol: all of them have the same row
        mixers = {spec.symbol: residual_layer(config, spec).mixer for spec in layer_specs(config)}
    rows = [mixer_axes(mixers[symbol], index) for index, symbol in enumerate(config.symbols)]
    for key, value in (("attention.kv_groups", config.attention.kv_groups), ("meta_tokens", config.meta_tokens)):
        if value:
            raise ValueError(f"model.{key}={value}: a model with them cannot be pruned")
    return rows
