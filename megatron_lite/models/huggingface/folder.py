"""Reading a Hugging Face folder: config.json and safetensors, one file or several, tensor by tensor.

Names, shapes and dtypes are compared with what the config says from the files' headers alone, before any
weight is read. Nothing is unpickled: `.bin` weights are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_lite.models.config import ModelConfig
from megatron_lite.models.huggingface.export import expected_shapes
from megatron_lite.models.huggingface.registry import family_of
from megatron_lite.models.huggingface.rules import Rule

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Tables that old exports stored as if they were weights; they follow from the config.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".self_attn.bias", ".self_attn.masked_bias")


class HuggingFaceFolder(NamedTuple):
    """An opened folder; `extra` is what `export_folder` takes to write the other fields back."""

    config: ModelConfig
    tensors: NativeTensors
    extra: dict[str, Any]


def is_folder(path: str | Path) -> bool:
    """Whether `path` looks like a Hugging Face folder (it has a config.json)."""
    return (Path(path) / "config.json").is_file()


def open_folder(path: str | Path) -> HuggingFaceFolder:
    """Opens a folder: the model's config, its native tensors (read one by one when asked for), and the other
    fields.

    Raises ValueError naming the field, tensor or file that cannot be held, with the way out.
    """
    folder = Path(path)
    hf_config = _read_json(folder / "config.json")
    family = family_of(hf_config)
    config = family.from_hf_config(hf_config)
    extra: dict[str, Any] = {"config": family.extra(hf_config, config)}
    if (folder / "generation_config.json").is_file():
        extra["generation_config"] = _read_json(folder / "generation_config.json")
    tensors = NativeTensors(_SafetensorsFiles(folder), rules=family.rules(config), config=config)
    return HuggingFaceFolder(config, tensors, extra)


class NativeTensors(Mapping[str, Tensor]):
    """Native name -> tensor of a Hugging Face folder; every look-up reads the file anew and keeps nothing."""

    def __init__(self, files: _SafetensorsFiles, *, rules: list[Rule], config: ModelConfig) -> None:
        self._files = files
        self._rules = {rule.native: rule for rule in rules}
        self._check(config)

    def __getitem__(self, name: str) -> Tensor:
        rule = self._rules[name]
        return rule.to_native([self._files.read(hf_name) for hf_name in rule.hf])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def _check(self, config: ModelConfig) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for native, native_shape in expected_shapes(config).items():
            rule = self._rules[native]
            parts = rule.to_hf(torch.empty(native_shape, device="meta"))
            for hf_name, part in zip(rule.hf, parts, strict=True):
                expected[hf_name] = tuple(part.shape)
        found = {name for name in self._files.names if not name.endswith(IGNORED_SUFFIXES)}
        if config.tie_embeddings and "lm_head.weight" in found:
            found.discard("lm_head.weight")
            if not torch.equal(self._files.read("lm_head.weight"), self._files.read("model.embed_tokens.weight")):
                raise ValueError(
                    "config.json: tie_word_embeddings=True, but lm_head.weight differs from "
                    "model.embed_tokens.weight; set it to false if the head is its own matrix, or remove "
                    "lm_head.weight"
                )
        missing, unknown = sorted(expected.keys() - found), sorted(found - expected.keys())
        if missing or unknown:
            raise ValueError(
                f"{self._files.folder}: the weights are not those that config.json describes: missing "
                f"{missing[:5] or 'none'}, not known {unknown[:5] or 'none'}"
            )
        for name, shape in expected.items():
            self._files.check(name, shape)


class _SafetensorsFiles:
    """The safetensors files of a folder, with a map from tensor to file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[str, Any] = {}
        self._file_of = self._find()
        self.names = set(self._file_of)

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        return self._open(self._file_of[name]).get_tensor(name)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ValueError when the header says another shape, or numbers that are no floats."""
        header = self._open(self._file_of[name]).get_slice(name)
        if tuple(header.get_shape()) != shape:
            raise ValueError(
                f"{self.folder}: {name} has shape {tuple(header.get_shape())}, but config.json describes {shape}"
            )
        if header.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(
                f"{self.folder}: {name} is stored as {header.get_dtype()}; only F64, F32, F16 and BF16 "
                "weights can be read, so export an unquantised model"
            )

    def _find(self) -> dict[str, str]:
        if (self.folder / INDEX).is_file():
            weight_map = _read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{self.folder / INDEX} has no weight_map")
            held: dict[str, set[str]] = {}
            for file_name in set(weight_map.values()):
                if Path(str(file_name)).name != file_name:
                    raise ValueError(f"{self.folder / INDEX} points outside its folder: {file_name!r}")
                held[file_name] = set(self._open(file_name).keys())
            for name, file_name in weight_map.items():
                if name not in held[file_name]:
                    raise ValueError(f"{self.folder / INDEX} looks for {name} in {file_name}, which does not have it")
            return weight_map
        if (self.folder / SINGLE).is_file():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        pickles = sorted(self.folder.glob("*.bin")) + sorted(self.folder.glob("*.pt*"))
        if pickles:
            raise ValueError(
                f"{pickles[0]} is a pickle, which may run any code when it is loaded, so it is not read; "
                "load the model with transformers where you trust it and save it again with "
                "save_pretrained(), which writes safetensors"
            )
        raise ValueError(f"{self.folder} has neither {SINGLE} nor {INDEX}; is the download complete?")

    def _open(self, file_name: str) -> Any:
        if file_name not in self._handles:
            path = self.folder / file_name
            if not path.is_file():
                raise ValueError(f"{path} is missing; is the download complete?")
            try:
                self._handles[file_name] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from error
        return self._handles[file_name]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; this is no Hugging Face model folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content
