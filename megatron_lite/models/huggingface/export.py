"""Writing a Hugging Face folder: config.json, generation_config.json and safetensors shards.

Streams tensor by tensor: at any moment one native tensor and one that is written are in memory, never a file or the
model. The folder appears whole or not at all (written beside its place, then renamed). Dtypes are kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.atomic import whole_folder
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.huggingface.llama import exportable
from megatron_lite.models.huggingface.registry import family_named
from megatron_lite.models.huggingface.rules import Rule
from megatron_lite.tensor_files import WholeTensors, write_safetensors

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
    config, extra = exportable(config), extra or {}
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


class _Natives:
    """The native tensors, read when they are asked for. The last one is kept, because one may hold several of Hugging Face's."""

    def __init__(self, tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
        self._tensors, self._shapes = tensors, expected_shapes(config)
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        """Raises ValueError for a tensor that is not of the config's shape."""
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        self._last = None  # before the next one is read: they are as large as memory has to be
        tensor = self._tensors[name].detach()
        if tensor.shape != self._shapes[name]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but the config describes {tuple(self._shapes[name])}"
            )
        self._last = name, tensor
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor, if possible without reading it."""
        return self._tensors.dtype(name) if isinstance(self._tensors, WholeTensors) else self[name].dtype


@dataclass(frozen=True)
class _Part:
    """Hugging Face tensor number `index` of a rule: see `tensor_files.Part`."""

    natives: _Natives
    rule: Rule
    index: int
    sizes: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """On the CPU, contiguous."""
        return self.rule.to_hf(self.natives[self.rule.native])[self.index].cpu().contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.sizes) * self.dtype.itemsize


def _parts(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, _Part]:
    """Hugging Face name -> its tensor, in the order of the layers; no value is read."""
    shapes, natives = expected_shapes(config), _Natives(tensors, config)
    parts = {}
    for rule in family_named(config.family).rules(config):
        dtype = natives.dtype(rule.native)
        of_rule = rule.to_hf(torch.empty(shapes[rule.native], device="meta"))
        for index, (name, part) in enumerate(zip(rule.hf, of_rule, strict=True)):
            parts[name] = _Part(natives, rule, index, tuple(part.shape), dtype)
    return parts


def _write_shards(
    folder: Path, *, config: ModelConfig, tensors: Mapping[str, Tensor], max_shard_bytes: int
) -> torch.dtype:
    """Writes model*.safetensors (and the index, when there are several); returns the embedding's dtype."""
    parts = _parts(config, tensors)
    shards: list[dict[str, _Part]] = [{}]
    filled = 0
    for name, part in parts.items():
        if shards[-1] and filled + part.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = part
        filled += part.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file_name = "model.safetensors" if len(shards) == 1 else several
        with open(folder / file_name, "wb") as stream:
            write_safetensors(stream, shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    if len(shards) > 1:
        total = sum(part.nbytes for part in parts.values())
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return next(iter(parts.values())).dtype


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
