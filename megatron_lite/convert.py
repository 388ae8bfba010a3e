"""`mlite convert`: to and from Hugging Face folders.

python -m megatron_lite.convert source=runs/smoke target=exported to=hf
python -m megatron_lite.convert source=exported target=runs/imported to=native
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.checkpoint.store import CheckpointConfig, CheckpointStore
from megatron_lite.config import ConvertConfig, run_door, to_dict
from megatron_lite.data.tokenizer import fingerprint, load_tokenizer, tokenizer_files
from megatron_lite.models.huggingface import export_folder
from megatron_lite.weights import TOKENIZER, Weights, open_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Cast(Mapping[str, Tensor]):
    """The same tensors in another dtype, cast one by one when asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.tensors, self.dtype = tensors, dtype

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def main() -> None:
    """Parse, convert, exit."""
    run_door("convert", "Convert a run, a checkpoint or a Hugging Face folder.", convert)


def convert(config: ConvertConfig) -> int:
    """Write `target` from `source`. Raises ValueError when either cannot hold the model."""
    if config.to not in ("hf", "native"):
        raise ValueError(f"to={config.to} is unknown; choose hf or native")
    if config.dtype not in ("source", *DTYPES):
        raise ValueError(f"dtype={config.dtype} is unknown; choose source, {', '.join(DTYPES)}")
    weights = open_weights(config.source)
    tensors = weights.tensors if config.dtype == "source" else Cast(weights.tensors, DTYPES[config.dtype])
    if config.to == "hf":
        _to_hugging_face(config, weights, tensors)
    else:
        _to_native(config, weights, tensors)
    print(f"{weights.path} -> {config.target}")
    return 0


def _to_hugging_face(config: ConvertConfig, weights: Weights, tensors: Mapping[str, Tensor]) -> None:
    extra = weights.extra
    if weights.tokenizer is None:
        print("warning: no tokenizer lies beside the source; the exported folder has none")
    elif not extra:
        tokenizer = load_tokenizer(weights.tokenizer)
        extra = {"config": {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}}
    export_folder(
        config.target,
        config=weights.config,
        tensors=tensors,
        extra=extra,
        max_shard_bytes=int(config.max_shard_gb * 2**30),
    )
    if weights.tokenizer is not None:
        copy_tokenizer(weights.tokenizer, Path(config.target))


def _to_native(config: ConvertConfig, weights: Weights, tensors: Mapping[str, Tensor]) -> None:
    """A run directory with one checkpoint of step 0 that holds weights only: for `init_from`, evaluate, generate, load."""
    target = Path(config.target)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"target={target} exists and is not empty; choose another folder or remove it")
    identity = ""
    if weights.tokenizer is not None:
        (target / TOKENIZER).mkdir(parents=True)
        copy_tokenizer(weights.tokenizer, target / TOKENIZER)
        identity = fingerprint(target / TOKENIZER)
    state = {
        "consumed_samples": 0,
        "adam_step": 0,
        "config": {"model": to_dict(weights.config), "data": {"tokenizer": str(target / TOKENIZER)}},
        "tokenizer": identity,
        "schedule": {},
        "data": {},
        "rng": {},
    }
    store = CheckpointStore(target / "checkpoints", CheckpointConfig())
    store.save(0, {f"model.{name}": tensor for name, tensor in tensors.items()}, state)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, and nothing else, from one folder to another."""
    for path in tokenizer_files(source):
        shutil.copy2(path, target / path.name)


if __name__ == "__main__":
    main()
