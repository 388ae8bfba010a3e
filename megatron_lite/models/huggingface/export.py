"""Writing a Hugging Face folder: config.json, generation_config.json and safetensors shards.

Streams tensor by tensor: at any moment one shard's tensors and one native tensor are in memory, never the
model. The folder appears whole or not at all (written beside its place, then renamed). Dtypes are kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_lite.atomic import whole_folder
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.huggingface.registry import family_named

GIB = 1 << 30
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_folder(
    path: str | Path,
    *,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    extra: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 4 * GIB,
) -> None:
    """Writes the folder `path` from native `tensors` (names of Decoder's parameters, looked up one by one).

    extra: what `open_folder` kept beside the model, {"config": {...}, "generation_config": {...}}; or just
      {"config": {"bos_token_id": .., "eos_token_id": ..}} from a tokenizer. Tokenizer files are the caller's
      to add.
    Raises ValueError when the folder exists and is not empty, the family cannot hold the config, or tensors
    are missing, left over or of another shape.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"target={str(path)!r} exists and is not an empty folder; choose another or remove it")
    extra = extra or {}
    # Explicit nulls: where they are absent transformers would put the token numbers of the published model.
    others = dict.fromkeys(TOKEN_IDS) | dict(extra.get("config", {}))
    hf_config = family_named(config.family).with_extra(config, others)
    check_native(config, tensors)
    with whole_folder(target) as work:
        dtype = _write_shards(work, config=config, tensors=tensors, max_shard_bytes=max_shard_bytes)
        # torch_dtype is the name that every version of transformers reads.
        hf_config |= {"torch_dtype": str(dtype).removeprefix("torch.")}
        ids = {key: others[key] for key in TOKEN_IDS if others.get(key) is not None}
        _write_json(work / "config.json", hf_config)
        _write_json(
            work / "generation_config.json",
            extra.get("generation_config") or {"_from_model_config": True} | ids,
        )


def native_to_hf(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, contiguous CPU tensor) for every tensor, in the order of the layers."""
    shapes = expected_shapes(config)
    for rule in family_named(config.family).rules(config):
        native = tensors[rule.native].detach()
        if native.shape != shapes[rule.native]:
            raise ValueError(
                f"{rule.native} has shape {tuple(native.shape)}, but the config describes {tuple(shapes[rule.native])}"
            )
        for name, tensor in zip(rule.hf, rule.to_hf(native), strict=True):
            yield name, tensor.cpu().contiguous()


def expected_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Native parameter names and shapes."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Decoder(config).named_parameters()}


def check_native(config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError when the names of `tensors` are not the model's."""
    expected = expected_shapes(config)
    missing, left_over = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or left_over:
        raise ValueError(
            f"the tensors are not those of this model: missing {missing[:5] or 'none'}, not known "
            f"{left_over[:5] or 'none'}"
        )


def _write_shards(
    folder: Path, *, config: ModelConfig, tensors: Mapping[str, Tensor], max_shard_bytes: int
) -> torch.dtype:
    """Writes model*.safetensors (and the index, when there are several); returns the embedding's dtype."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0
    first_dtype: torch.dtype | None = None

    def flush() -> None:
        file = folder / f"part-{len(shards)}.safetensors"
        try:
            save_file(pending, file, metadata={"format": "pt"})
        except SafetensorError as error:  # it wraps what the disk says
            raise OSError(None, str(error), str(file)) from error
        shards.append(list(pending))
        pending.clear()

    for name, tensor in native_to_hf(config, tensors):
        first_dtype = first_dtype or tensor.dtype
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > max_shard_bytes:
            flush()
            pending_bytes = 0
        pending[name] = tensor
        pending_bytes += size
        total_bytes += size
    flush()
    assert first_dtype is not None
    _name_shards(folder, shards, total_bytes)
    return first_dtype


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    if len(shards) == 1:
        (folder / "part-0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file_name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{index}.safetensors").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total_bytes}, "weight_map": weight_map},
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
