"""A picture of the scores: one panel for each axis, one row for each layer, so that dead channels and layers are seen at a glance."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.atomic import whole_file
from megatron_lite.compress.axes import layer_axes
from megatron_lite.compress.scores import ImportanceConfig, Scores
from megatron_lite.compress.sizes import unit_layers
from megatron_lite.models.config import ModelConfig

MOST_COLUMNS = 512  # of a panel; neighbors are averaged beyond


def draw_scores(path: Path, scores: Scores, config: ModelConfig, options: ImportanceConfig) -> None:
    """Write a PNG to `path`, atomically. Colors are the logarithm of a score relative to the mean of its row."""
    from matplotlib.figure import Figure  # a second to import, and only this function draws

    panels = _panels(scores, config, options)
    figure = Figure(figsize=(9, 1.2 + 2.2 * (len(panels) + 1)), layout="constrained")
    axes = figure.subplots(len(panels) + 1, 1)
    for axis, (title, rows) in zip(axes, panels.items()):
        image = torch.stack([_relative(row) for row in rows.values()])
        drawn = axis.imshow(image.numpy(), aspect="auto", cmap="magma", interpolation="nearest")
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_yticks(range(len(rows)), [str(layer) for layer in rows], fontsize=5 if len(rows) > 20 else 7)
        axis.set_ylabel("layer")
        figure.colorbar(drawn, ax=axis, label="log2 of score / mean")
    depth = scores.depth()
    axes[-1].bar([str(layers[0]) for layers in unit_layers(config)], depth.tolist(), color="#2a78d6")
    axes[-1].set_title("depth: 1 - cos(input, output), by first layer", loc="left", fontsize=10)
    axes[-1].tick_params(axis="x", labelsize=6)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, facecolor="white", metadata={"Software": None})


def _panels(scores: Scores, config: ModelConfig, options: ImportanceConfig) -> dict[str, dict[int, Tensor]]:
    """Title -> layer -> its scores."""
    panels: dict[str, dict[int, Tensor]] = {"hidden_size: channels of the residual stream": {}}
    for layer, row in enumerate(layer_axes(config)):
        panels["hidden_size: channels of the residual stream"][layer] = scores.root(
            f"layers.{layer}.norm", options.batch
        )
        title = f"{' and '.join(row.axes)}: channels read at {row.reads[0]}"
        panels.setdefault(title, {})[layer] = scores.root(f"layers.{layer}.mixer", options.batch)
    return panels


def _relative(row: Tensor) -> Tensor:
    if len(row) > MOST_COLUMNS:
        row = torch.stack([part.mean() for part in row.tensor_split(MOST_COLUMNS)])
    return (row / row.mean().clamp(min=1e-30)).clamp(min=2.0**-8, max=2.0**8).log2()
