"""Reading a Hugging Face folder: config.json and safetensors, one file or several, slice by slice.

Names, shapes and dtypes are compared with what the config says from the files' headers alone, before any
weight is read. Nothing is unpickled: `.bin` weights are refused.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_lite.models.config import ModelConfig
from megatron_lite.models.huggingface.export import expected_shapes
from megatron_lite.models.huggingface.registry import family_of
from megatron_lite.models.huggingface.rules import Rule
from megatron_lite.tensor_files import TensorFiles, read_slice

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Tables that old exports stored as if they were weights; they follow from the config.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".self_attn.bias", ".self_attn.masked_bias")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HEAD = "lm_head.weight"

_BLOCK_ROWS = 4096  # rows of two matrices that are compared at a time


class HuggingFaceFolder(NamedTuple):
    """An opened folder; `extra` is what `export_folder` takes to write the other fields back."""

    config: ModelConfig
    tensors: NativeTensors
    extra: dict[str, Any]


def is_folder(path: str | Path) -> bool:
    """Whether `path` looks like a Hugging Face folder (it has a config.json)."""
    return (Path(path) / "config.json").is_file()


def read_config(path: str | Path) -> ModelConfig:
    """The model's config. Raises ValueError naming the field that cannot be held."""
    hf_config = _read_json(Path(path) / "config.json")
    return family_of(hf_config).from_hf_config(hf_config)


def open_folder(path: str | Path) -> HuggingFaceFolder:
    """Opens a folder: the model's config, its native tensors (read when asked for), and the other fields.

    What headers cannot tell, `NativeTensors.problem` looks at.
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


class NativeTensors:
    """The native tensors of a Hugging Face folder: see `tensor_files.TensorSource`."""

    def __init__(self, files: _SafetensorsFiles, *, rules: list[Rule], config: ModelConfig) -> None:
        self._files = files
        self._rules = {rule.native: rule for rule in rules}
        self._shapes = {name: tuple(shape) for name, shape in expected_shapes(config).items()}
        self._embedding = self._rules["embedding.weight"].hf[0]
        self._check(tied=config.tie_embeddings)

    def names(self) -> Collection[str]:
        """See `TensorSource`."""
        return self._rules.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource`."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """See `TensorSource`."""
        return reduce(torch.promote_types, (self._files.dtype(hf_name) for hf_name in self._rules[name].hf))

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """See `TensorSource`: the runs of rows that the slice consists of, and of them the slice's columns."""
        rule, dtype = self._rules[name], self.dtype(name)
        parts = [torch.empty(0, *sizes[1:], dtype=dtype)]
        for part, start, count in rule.runs_of(self._shapes[name][0], start=offsets[0], count=sizes[0]):
            shape = (count, *sizes[1:])
            if part is None:
                parts.append(torch.zeros(shape, dtype=dtype))
            else:
                parts.append(self._files.read(rule.hf[part], (start, *offsets[1:]), shape).to(dtype))
        return parts[1] if len(parts) == 2 else torch.cat(parts)

    def problem(self, part: int = 0, parts: int = 1) -> str | None:
        """What is wrong with the values: a head of its own where the config says that it is the embedding.

        The rows are compared in `parts`, of which this is number `part`: several processes share the work.
        """
        if not self._has_tied_head:
            return None
        rows, columns = self._files.shape(HEAD)
        first, last = rows * part // parts, rows * (part + 1) // parts
        for row in range(first, last, _BLOCK_ROWS):
            region = (row, 0), (min(_BLOCK_ROWS, last - row), columns)
            if not torch.equal(self._files.read(HEAD, *region), self._files.read(self._embedding, *region)):
                return (
                    f"config.json: tie_word_embeddings=True, but {HEAD} differs from {self._embedding}; set it to false if "
                    f"the head is its own matrix, or remove {HEAD}"
                )
        return None

    def _check(self, *, tied: bool) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for native, native_shape in self._shapes.items():
            rule = self._rules[native]
            parts = rule.to_hf(torch.empty(native_shape, device="meta"))
            for hf_name, part in zip(rule.hf, parts, strict=True):
                expected[hf_name] = tuple(part.shape)
        found = {name for name in self._files.names if not name.endswith(IGNORED_SUFFIXES)}
        self._has_tied_head = tied and HEAD in found
        if self._has_tied_head:
            expected[HEAD] = expected[self._embedding]
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
        self._files = TensorFiles(folder)
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}  # tensor -> (shape, dtype as the file says it)
        self._file_of = self._find()
        self.names = set(self._file_of)

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A slice of one tensor."""
        return read_slice(self._files[self._file_of[name]], name, offsets, sizes)

    def shape(self, name: str) -> tuple[int, ...]:
        """As the header says it."""
        return self._headers[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """As the header says it."""
        return DTYPES[self._headers[name][1]]

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ValueError when the header says another shape, or numbers that are not floats."""
        found, dtype = self._headers[name]
        if found != shape:
            raise ValueError(f"{self.folder}: {name} has shape {found}, but config.json describes {shape}")
        if dtype not in DTYPES:
            raise ValueError(
                f"{self.folder}: {name} is stored as {dtype}; only {', '.join(DTYPES)} weights can be read, so export "
                "an unquantized model"
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
                held[file_name] = self._read_header(file_name)
            for name, file_name in weight_map.items():
                if name not in held[file_name]:
                    raise ValueError(f"{self.folder / INDEX} looks for {name} in {file_name}, which does not have it")
            return weight_map
        if (self.folder / SINGLE).is_file():
            return dict.fromkeys(self._read_header(SINGLE), SINGLE)
        pickles = sorted(self.folder.glob("*.bin")) + sorted(self.folder.glob("*.pt*"))
        if pickles:
            raise ValueError(
                f"{pickles[0]} is a pickle, which may run any code when it is loaded, so it is not read; "
                "load the model with transformers where you trust it and save it again with "
                "save_pretrained(), which writes safetensors"
            )
        raise ValueError(f"{self.folder} has neither {SINGLE} nor {INDEX}; is the download complete?")

    def _read_header(self, file_name: str) -> set[str]:
        """The names of the tensors of a file; notes their shapes and dtypes."""
        opened = self._files[file_name]
        names = set(opened.names())
        for name in names:
            self._headers[name] = opened.shape(name), opened.dtype(name)
        return names


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; this is not a Hugging Face model folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content
