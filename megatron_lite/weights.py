"""Where weights come from: a run directory, one of its checkpoints, or a Hugging Face folder.

Notable features:
- `open_weights` reads headers only; tensors come one by one when asked for, so that a converted or evaluated model never stands in
  memory twice.
- Evaluate, generate, convert, weights-only starts and `megatron_lite.load` all go through it and so take the same paths.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.checkpoint.reader import SavedTensors, find_checkpoint
from megatron_lite.config.compose import from_dict
from megatron_lite.data.tokenizer import fingerprint, load_tokenizer, tokenizer_files
from megatron_lite.errors import CheckpointError
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.huggingface import expected_shapes, is_folder, open_folder
from megatron_lite.models.narrowing import narrow

TOKENIZER = "tokenizer"  # the folder of a run directory that holds a copy of its tokenizer
HUGGING_FACE = "huggingface"  # the manifest's key for the rest of the folder that a checkpoint was converted from


@dataclass(frozen=True)
class Weights:
    """A model on disk. `tokenizer` is None where none lies beside it.

    extra: what a Hugging Face folder says beside the model (padding token, several end tokens, generation config), also of a
    checkpoint that was converted from one; `export_folder` writes it back.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    tokenizer: Path | None = None
    manifest: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Identity of the tokenizer that the model was trained with; None where nothing says it."""
        if self.manifest is not None:
            return self.manifest["tokenizer"] or None
        return fingerprint(self.tokenizer) if self.tokenizer else None


def open_weights(path: str | Path) -> Weights:
    """What lies at `path`: a run directory (its newest valid checkpoint), a checkpoint, or a Hugging Face folder.

    Raises ValueError when it is none of them, CheckpointError when the named checkpoint is damaged.
    """
    if not str(path).strip():
        raise ValueError(
            "the path of the weights is empty; give a run directory, a checkpoint of it or a Hugging Face folder"
        )
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a run directory, a checkpoint of it or a Hugging Face folder")
    if is_folder(path):
        opened = open_folder(path)
        tokenizer = path if tokenizer_files(path) else None
        return Weights(path, opened.config, opened.tensors, tokenizer, extra=opened.extra)
    checkpoint = find_checkpoint(path)
    manifest = read_manifest(checkpoint)
    config = from_dict(ModelConfig, manifest["config"].get("model", {}))
    _check_shapes(checkpoint, config, manifest["tensors"])
    return Weights(
        checkpoint,
        config,
        SavedTensors(checkpoint, prefix="model."),
        _tokenizer_of(checkpoint, manifest),
        manifest,
        extra=manifest.get(HUGGING_FACE, {}),
    )


def _check_shapes(checkpoint: Path, config: ModelConfig, entries: Mapping[str, Any]) -> None:
    """Raise CheckpointError when the tensors of a manifest are not those of the model that it describes: before memory is taken."""
    try:
        config.validate()
        shapes = expected_shapes(config)
    except (ValueError, RuntimeError) as error:  # RuntimeError: sizes beyond all measure
        raise CheckpointError(f"{checkpoint} describes no model that can be built: {error}") from error
    found = {name.removeprefix("model."): e["shape"] for name, e in entries.items() if name.startswith("model.")}
    wrong = sorted(name for name in shapes.keys() | found.keys() if list(shapes.get(name, ())) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"{checkpoint} is no checkpoint of the model that its manifest describes: {wrong[0]} has shape {found.get(wrong[0])} "
            f"there and {list(shapes.get(wrong[0], ()))} by the config; take another checkpoint"
        )


def load(path: str | Path, *, device: str | torch.device = "cpu") -> tuple[Decoder, Any]:
    """The model at `path` in fp32 on `device`, in evaluation mode, and its tokenizer (None where there is none).

    `model(tokens_BT)` gives logits (B, T, V). Paths and errors as in `open_weights`.
    """
    weights = open_weights(path)
    tokenizer = load_tokenizer(weights.tokenizer) if weights.tokenizer else None
    return load_decoder(weights, device=device), tokenizer


def load_decoder(weights: Weights, *, device: str | torch.device = "cpu") -> Decoder:
    """A decoder with these weights, filled tensor by tensor."""
    with torch.device("meta"):
        decoder = Decoder(weights.config)
    decoder.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(narrow(name, weights.tensors[name], parameter.dtype))
    return decoder.eval()


def _tokenizer_of(checkpoint: Path, manifest: dict[str, Any]) -> Path | None:
    """The run's copy of its tokenizer, else the folder that the config named, if it is still the same one."""
    copy = checkpoint.parent.parent / TOKENIZER
    named = str(manifest["config"].get("data", {}).get("tokenizer") or "")
    for folder in (copy, Path(named)) if named else (copy,):
        if tokenizer_files(folder) and fingerprint(folder) == manifest["tokenizer"]:
            return folder
    return None


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, and nothing else, from one folder to another, which is made if need be."""
    target.mkdir(parents=True, exist_ok=True)
    for path in tokenizer_files(source):
        shutil.copy2(path, target / path.name)
