"""Where weights come from: a run directory, one of its checkpoints, or a Hugging Face folder.

Notable features:
- `open_weights` reads headers and verifies the files once, with the work divided over the ranks. Values are read slice by
  slice on demand, so a rank reads only what it holds, and a converted or evaluated model is never in memory twice.
- Evaluate, generate, convert, weights-only starts and `megatron_lite.load` all use it and accept the same paths.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_lite.atomic import whole_folder
from megatron_lite.checkpoint.manifest import identity
from megatron_lite.checkpoint.opening import Verifier, hash_of_files, newest_manifest, not_found
from megatron_lite.checkpoint.reader import Prefixed
from megatron_lite.checkpoint.store import CheckpointConfig, CheckpointStore
from megatron_lite.config.compose import from_dict, to_dict
from megatron_lite.data.tokenizer import fingerprint, load_tokenizer, tokenizer_files
from megatron_lite.errors import CheckpointError
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.huggingface import expected_shapes, is_folder, open_folder, read_config
from megatron_lite.parallel.assemble import assemble, bare, from_tensors
from megatron_lite.parallel.global_view import Piece
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parallelize import Recipe
from megatron_lite.precision.numerics import EVENTS
from megatron_lite.ranks import Ranks
from megatron_lite.tensor_files import TensorSource, WholeTensors

TOKENIZER = "tokenizer"  # the folder of a run directory that holds a copy of its tokenizer
# Kinds of tensors of a checkpoint beside "model": what a start with the optimizer's state takes over, what a forward pass in FP8 needs.
OPTIMIZER = ("exp_avg", "exp_avg_sq")
SCALES = ("scale_fwd",)
HUGGING_FACE = "huggingface"  # the manifest's key for the rest of the folder that a checkpoint was converted from


@dataclass(frozen=True)
class Weights:
    """A model on disk. `tokenizer` is None where there is none beside it.

    tensors: the weights by the names of the decoder's parameters. more: kind -> its tensors by the names of parameters (`OPTIMIZER`) or
    layers (`SCALES`), of the kinds that were asked for and are there.
    extra: other fields of a Hugging Face folder (padding token, several end tokens, generation config), also for a
    checkpoint that was converted from one; `export_folder` writes them back.
    """

    path: Path
    config: ModelConfig
    tensors: TensorSource
    tokenizer: Path | None = None
    manifest: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    more: Mapping[str, TensorSource] = field(default_factory=dict)

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Identity of the tokenizer that the model was trained with; None where nothing says it."""
        if self.manifest is not None:
            return self.manifest["tokenizer"] or None
        return fingerprint(self.tokenizer) if self.tokenizer else None


def open_weights(path: str | Path, ranks: Ranks | None = None, *, more: tuple[str, ...] = ()) -> Weights:
    """What is at `path`: a run directory (its newest valid checkpoint), a checkpoint, or a Hugging Face folder.

    ranks: the ranks that all open it and share the verifying; None: this process alone.
    more: further kinds of tensors to open (and verify).
    Raises ValueError when it is none of them, CheckpointError when the named checkpoint is damaged.
    """
    ranks = ranks or Ranks()
    path = ranks.attempt("look for the weights", partial(_existing, path))
    if is_folder(path):
        opened = ranks.attempt("open the folder", partial(open_folder, path))
        problems = ranks.problems("verify", lambda: opened.tensors.problem(ranks.rank, ranks.size))
        if problems:
            raise ValueError(f"{path}: {next(iter(problems.values()))}")
        tokenizer = path if tokenizer_files(path) else None
        return Weights(path, opened.config, opened.tensors, tokenizer, extra=opened.extra)
    kinds = ("model", *more)
    tensors = Verifier(ranks).find(path, prefixes=tuple(f"{kind}." for kind in kinds))
    manifest = tensors.manifest
    config = from_dict(ModelConfig, manifest["config"].get("model", {}))
    _check_shapes(tensors.path, config, manifest["tensors"])
    sources = {kind: Prefixed(tensors, f"{kind}.") for kind in kinds}
    return Weights(
        tensors.path,
        config,
        sources["model"],
        _tokenizer_of(tensors.path, manifest),
        manifest,
        extra=manifest.get(HUGGING_FACE, {}),
        more={kind: source for kind, source in sources.items() if kind in more and source.names()},
    )


def model_config(path: str | Path, ranks: Ranks) -> ModelConfig:
    """The config of the model at `path`, of which no weight is read. Errors as in `open_weights`."""
    path = _existing(path)
    if is_folder(path):
        return read_config(path)
    manifest = ranks.first("model config", lambda: newest_manifest(path))
    if manifest is None:
        raise ValueError(not_found(path))
    return from_dict(ModelConfig, manifest["config"].get("model", {}))


def trained_with(path: str | Path) -> dict[str, Any]:
    """The config of the run at `path`, from its newest manifest that can be read. Empty where there is none: of a Hugging Face folder,
    and of a path for which `open_weights` will say what is wrong with it."""
    with suppress(ValueError, CheckpointError, OSError):
        if not is_folder(_existing(path)) and (manifest := newest_manifest(path)) is not None:
            return manifest["config"]
    return {}


def identity_of(weights: Weights, ranks: Ranks) -> str:
    """A hash that changes with the model and its weights, wherever they are: of a checkpoint the manifest's, of a Hugging Face
    folder of its config and its tensor files, which are read once, with the work divided over the ranks. Collective."""
    if weights.manifest is not None:
        return identity(weights.manifest)
    return hash_of_files(weights.path, ("config.json", "*.safetensors"), ranks)[:16]


def _existing(path: str | Path) -> Path:
    what = "give a run directory, a checkpoint of it or a Hugging Face folder"
    if not str(path).strip():
        raise ValueError(f"the path of the weights is empty; {what}")
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist; {what}")
    return Path(path)


def _check_shapes(checkpoint: Path, config: ModelConfig, entries: Mapping[str, Any]) -> None:
    """Raise CheckpointError when the tensors of a manifest are not those of the model that it describes: before memory is taken."""
    try:
        config.validate()
        shapes = expected_shapes(config)
    except (ValueError, RuntimeError) as error:  # RuntimeError: sizes that no tensor can have
        raise CheckpointError(f"{checkpoint} does not describe a model that can be built: {error}") from error
    found = {name.removeprefix("model."): e["shape"] for name, e in entries.items() if name.startswith("model.")}
    wrong = sorted(name for name in shapes.keys() | found.keys() if list(shapes.get(name, ())) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"{checkpoint} is not a checkpoint of the model that its manifest describes: {wrong[0]} has shape {found.get(wrong[0])} "
            f"there and {list(shapes.get(wrong[0], ()))} by the config; take another checkpoint"
        )


def load(path: str | Path, *, device: str | torch.device = "cpu") -> tuple[Decoder, Any]:
    """The model at `path` in fp32 on `device`, in evaluation mode, and its tokenizer (None where there is none).

    `model(tokens_BT)` gives logits (B, T, V). Paths and errors as in `open_weights`.
    """
    weights = open_weights(path)
    tokenizer = load_tokenizer(weights.tokenizer) if weights.tokenizer else None
    mesh, fill = Mesh(device=torch.device(device)), from_tensors(weights.tensors)
    decoder, _ = assemble(weights.config, mesh=mesh, recipe=Recipe(), fill=fill, wrap=bare)
    return decoder.eval(), tokenizer


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


def check_empty(target: Path, *, key: str) -> None:
    """Raises ValueError naming `key` where `target` is something that `save_weights` will not write over."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{key}={target} exists and is not an empty folder; choose another folder or remove it")


def save_weights(target: Path, weights: Weights, *, dtype: torch.dtype | None = None, **more: Any) -> None:
    """Write a run directory with one checkpoint of step 0 that holds weights only: for `init_from`, evaluate, generate, load. Its tensors
    are read one by one when they are written.

    `weights.more` is written too. dtype: of the weights; None: as they are. more: further keys of the manifest. The data and the precision
    that the source was trained with, and the events that changed it, stay known. Raises ValueError where `target` is not a new or empty
    folder.
    """
    check_empty(target, key="target")
    before = {} if weights.manifest is None else weights.manifest["config"]
    trained = {key: before[key] for key in ("data", "precision") if key in before}
    events = {key: value for key, value in (weights.manifest or {}).items() if key == EVENTS}
    state = {
        "consumed_samples": 0,
        "counters": {"adam_step": 0},
        "config": {"data": {"tokenizer": ""}} | trained | {"model": to_dict(weights.config)},
        "tokenizer": weights.tokenizer_fingerprint or "",
        "schedule": {},
        "data": {},
        "rng": {},
        HUGGING_FACE: weights.extra,
        **events,
        **more,
    }
    pieces = _pieces("model", weights.tensors, dtype)
    for kind, source in weights.more.items():
        pieces |= _pieces(kind, source, None)
    with whole_folder(target) as work:
        if weights.tokenizer is not None:
            copy_tokenizer(weights.tokenizer, work / TOKENIZER)
        CheckpointStore(work / "checkpoints", CheckpointConfig()).save(0, pieces, state)


def _pieces(kind: str, source: TensorSource, dtype: torch.dtype | None) -> dict[str, Piece]:
    """The tensors of a kind as a checkpoint is written from them: read when they are written."""
    whole = WholeTensors(source, dtype)
    return {
        f"{kind}.{name}": Piece(partial(whole.__getitem__, name), source.shape(name), dtype=dtype or source.dtype(name))
        for name in source.names()
    }
