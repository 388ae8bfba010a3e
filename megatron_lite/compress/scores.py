"""Scores of importance: what the calibration saved, and the kept sets that follow from it for given sizes.

A file of scores holds for every place that was read the sum over the samples of the squared mean of |activation| (or what the options
say), of the whole model in the order of its parameters: nothing of the layout or the batch size that it was computed with. Roots are
taken when they are used:

    hidden_size      sum of the roots over the layers' norms (and, with `final_norm`, the last one)
    heads            L2 norm of the roots of a head's channels
    mamba            see `axes`
    depth            for each unit 1 - cos(input, output), the mean over the tokens; or the order of the iterative removal

The file is complete or a part: `samples` says how many were read, and a calibration continues from there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_lite.atomic import whole_file, write_json
from megatron_lite.compress.axes import HIDDEN, layer_axes
from megatron_lite.compress.sizes import sizes_of, unit_layers
from megatron_lite.compress.surgery import Selection
from megatron_lite.models.config import ModelConfig
from megatron_lite.tensor_files import TensorFile

FILE = "scores.safetensors"
SUMMARY = "scores.json"
DEPTH, TOKENS, FINAL_NORM, REMOVED = "depth", "tokens", "final_norm", "removed"
AGGREGATIONS = ("l2", "mean")


@dataclass
class ImportanceConfig:
    """How importance is measured.

    score: activation, or random (kept sets drawn with `seed`: what pruning by importance is compared with).
    samples: of the training data. batch, sequence: l2 or mean over samples and over the tokens of a sample (arXiv 2407.14679, table 13:
      L2 of means is best). final_norm: the norm before the head counts for the channels too, as in the paper; ModelOpt leaves it out.
    depth: cosine (one pass), or loss or logits: units are removed one by one, each time the one without which the loss, or the mean
      squared difference of the logits, is least; on the first `depth_samples` samples.
    save_every: samples after which the scores so far are written, for a calibration that is interrupted.
    """

    score: str = "activation"
    samples: int = 1024
    batch: str = "l2"
    sequence: str = "mean"
    final_norm: bool = False
    depth: str = "cosine"
    depth_samples: int = 64
    save_every: int = 128
    seed: int = 0

    def validate(self) -> None:
        """Raises ValueError naming the key."""
        for key, known in (
            ("score", ("activation", "random")),
            ("batch", AGGREGATIONS),
            ("sequence", AGGREGATIONS),
            ("depth", ("cosine", "loss", "logits")),
        ):
            if getattr(self, key) not in known:
                raise ValueError(f"importance.{key}={getattr(self, key)} is unknown; choose one of {', '.join(known)}")
        for key in ("samples", "depth_samples", "save_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"importance.{key}={getattr(self, key)} must be at least 1")

    def identity(self) -> dict[str, Any]:
        """What two calibrations must agree on for one to continue the other."""
        keys = ("batch", "sequence", "depth", *(("depth_samples",) if self.depth != "cosine" else ()))
        return {f"importance.{key}": getattr(self, key) for key in keys}


@dataclass
class Scores:
    """sums: place -> float64 sums over the `samples` samples that were read. removed: units in the order of the iterative removal.

    identity: model, data and options that they belong to.
    """

    identity: dict[str, Any]
    samples: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    removed: list[int] = field(default_factory=list)

    def root(self, place: str, batch: str) -> Tensor:
        """The scores of a place: the L2 norm over the samples, or their mean. (C,) float64."""
        total = self.sums[place]
        return total.sqrt() if batch == "l2" else total / max(self.samples, 1)

    def select(
        self, config: ModelConfig, sizes: Mapping[str, int], layers: tuple[int, ...], options: ImportanceConfig
    ) -> Selection:
        """The kept sets of these sizes (`sizes.sizes_of`; one that is missing stays) and residual layers."""
        sizes = sizes_of(config) | dict(sizes)
        rows = layer_axes(config)
        kept = {
            layer: rows[layer].kept(self.root(f"layers.{layer}.mixer", options.batch), config, sizes)
            for layer in layers
        }
        hidden = self.hidden(config, options).argsort(descending=True, stable=True)[: sizes[HIDDEN]]
        return Selection(layers, hidden.sort().values, kept)

    def hidden(self, config: ModelConfig, options: ImportanceConfig) -> Tensor:
        """The score of each channel of the residual stream, (D,)."""
        places = [f"layers.{layer}.norm" for layer in range(len(config.symbols))]
        places += [FINAL_NORM] * options.final_norm
        return torch.stack([self.root(place, options.batch) for place in places]).sum(dim=0)

    def depth(self) -> Tensor:
        """1 - cos of each unit, the mean over the tokens, (units,)."""
        return self.sums[DEPTH] / self.sums[TOKENS].clamp(min=1)

    def removal_order(self, config: ModelConfig, options: ImportanceConfig) -> list[int]:
        """Units from the least important one on; of an iterative removal as many as were removed."""
        if options.depth != "cosine" and options.score == "activation":
            return self.removed
        return self.depth().argsort(stable=True).tolist()

    def save(self, folder: Path) -> None:
        """Write both files, the numbers first; atomically, and over those of an earlier state."""
        described = {"identity": self.identity, "samples": self.samples, "removed": self.removed}
        with whole_file(folder / FILE) as temporary:
            save_file(
                {name: total.cpu().contiguous() for name, total in self.sums.items()},
                temporary,
                metadata={"scores": json.dumps(described)},
            )
        shapes = {name: list(total.shape) for name, total in self.sums.items()}
        write_json(folder / SUMMARY, described | {"shapes": shapes})

    @classmethod
    def load(cls, folder: Path) -> Scores | None:
        """What was saved in `folder`; None where nothing was. Raises ValueError for a file that is damaged."""
        path = folder / FILE
        if not path.exists():
            return None
        try:
            file = TensorFile(path)
            described = json.loads(file.metadata()["scores"])
            sums = {name: file.read(name, (0,), file.shape(name)) for name in file.names()}
            return cls(described["identity"], described["samples"], sums, described["removed"])
        except (KeyError, ValueError, OSError) as error:
            raise ValueError(f"{path} is not a file of scores ({error}); delete it, or give another scores=") from error

    def add(self, sums: Mapping[str, Tensor], *, samples: int) -> None:
        """Add what was read of further samples, and count them. Raises ValueError for sums that are not finite, and adds nothing."""
        if wrong := [place for place, total in sums.items() if not total.isfinite().all()]:
            raise ValueError(
                f"importance: what was read at {min(wrong, key=_layer_of)} is not finite in samples {self.samples} to {samples - 1}; the "
                "weights of checkpoint are damaged, or too large for this precision"
            )
        for place, total in sums.items():
            self.sums[place] = self.sums[place] + total if place in self.sums else total
        self.samples = samples

    def check(self, identity: Mapping[str, Any], folder: Path) -> None:
        """Raises ValueError naming the first thing that these scores were not computed for."""
        for key, value in identity.items():
            if self.identity.get(key) != value:
                raise ValueError(
                    f"scores={folder} was computed with {key}={self.identity.get(key)}, here it is {value}; give another "
                    "scores=, or delete that folder"
                )


def _layer_of(place: str) -> float:
    """The number of the layer that a place is in; after all layers for what is in none."""
    return next((int(part) for part in place.split(".") if part.isdigit()), math.inf)


def random_scores(config: ModelConfig, seed: int) -> Scores:
    """Scores without meaning, drawn with `seed`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        return torch.rand(count, dtype=torch.float64, generator=generator)

    scores = Scores({"seed": seed}, samples=1)
    for layer, row in enumerate(layer_axes(config)):
        scores.sums[f"layers.{layer}.mixer"] = draw(row.width(config))
        scores.sums[f"layers.{layer}.norm"] = draw(config.hidden_size)
    scores.sums[FINAL_NORM] = draw(config.hidden_size)
    scores.sums[DEPTH], scores.sums[TOKENS] = draw(len(unit_layers(config))), torch.ones(1, dtype=torch.float64)
    return scores
