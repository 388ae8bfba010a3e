"""`mlite convert`: to and from Hugging Face folders.

python -m megatron_lite convert source=runs/smoke target=exported to=hf
python -m megatron_lite convert source=exported target=runs/imported to=native
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_lite.atomic import whole_folder
from megatron_lite.checkpoint.store import CheckpointConfig, CheckpointStore
from megatron_lite.commands.command import run_command
from megatron_lite.config.compose import to_dict
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.models.huggingface import export_folder
from megatron_lite.parallel.global_view import Piece
from megatron_lite.tensor_files import TensorSource, WholeTensors
from megatron_lite.weights import HUGGING_FACE, TOKENIZER, Weights, copy_tokenizer, open_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class ConvertConfig:
    """`mlite convert`: from `source` (a run, a checkpoint or a Hugging Face folder) to the folder `target`."""

    source: str = "???"
    target: str = "???"
    to: str = "hf"
    dtype: str = "source"
    max_shard_gb: float = 5.0


def main() -> None:
    """Parse, convert, exit."""
    run_command("convert", ConvertConfig, "Convert a run, a checkpoint or a Hugging Face folder.", convert)


def convert(config: ConvertConfig) -> int:
    """Write `target` from `source`. Raises ValueError when either cannot hold the model."""
    if config.to not in ("hf", "native"):
        raise ValueError(f"to={config.to} is unknown; choose hf or native")
    if config.dtype not in ("source", *DTYPES):
        raise ValueError(f"dtype={config.dtype} is unknown; choose source, {', '.join(DTYPES)}")
    if not config.max_shard_gb > 0:
        raise ValueError(f"max_shard_gb={config.max_shard_gb} must be above 0")
    if not config.target.strip() or Path(config.target).resolve() == Path.cwd():
        raise ValueError(f"target={config.target} is the folder that you are in; name a new one")
    weights = open_weights(config.source)
    if config.to == "hf":
        _to_hugging_face(config, weights)
    else:
        _to_native(config, weights)
    print(f"{weights.path} -> {config.target}")
    return 0


def _to_hugging_face(config: ConvertConfig, weights: Weights) -> None:
    extra = weights.extra
    if weights.tokenizer is None:
        print("warning: there is no tokenizer beside the source; the exported folder has none")
    elif not extra:
        tokenizer = load_tokenizer(weights.tokenizer)
        extra = {"config": {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}}
    export_folder(
        config.target,
        config=weights.config,
        tensors=WholeTensors(weights.tensors, DTYPES.get(config.dtype)),
        extra=extra,
        max_shard_bytes=int(min(config.max_shard_gb * 2**30, 2**63)),
    )
    if weights.tokenizer is not None:
        try:
            copy_tokenizer(weights.tokenizer, Path(config.target))
        except OSError:  # a folder without its tokenizer would look whole
            shutil.rmtree(config.target, ignore_errors=True)
            raise


def _to_native(config: ConvertConfig, weights: Weights) -> None:
    """A run directory with one checkpoint of step 0 that holds weights only: for `init_from`, evaluate, generate, load."""
    target = Path(config.target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"target={target} exists and is not an empty folder; choose another folder or remove it")
    state = {
        "consumed_samples": 0,
        "counters": {"adam_step": 0},
        "config": {"model": to_dict(weights.config), "data": {"tokenizer": ""}},
        "tokenizer": weights.tokenizer_fingerprint or "",
        "schedule": {},
        "data": {},
        "rng": {},
        HUGGING_FACE: weights.extra,
    }
    with whole_folder(target) as work:
        if weights.tokenizer is not None:
            copy_tokenizer(weights.tokenizer, work / TOKENIZER)
        store = CheckpointStore(work / "checkpoints", CheckpointConfig())
        store.save(0, _pieces(weights.tensors, DTYPES.get(config.dtype)), state)


def _pieces(source: TensorSource, dtype: torch.dtype | None) -> dict[str, Piece]:
    """The weights as they are saved: each is read when it is written."""
    tensors = WholeTensors(source, dtype)
    return {
        f"model.{name}": Piece(
            partial(tensors.__getitem__, name), source.shape(name), dtype=dtype or source.dtype(name)
        )
        for name in source.names()
    }
