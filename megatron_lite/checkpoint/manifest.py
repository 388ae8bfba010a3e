"""`manifest.json`: everything of a checkpoint that is no tensor, and the names, sizes and hashes of the
files that are.

A manifest is a JSON object. The caller's part is `STATE_KEYS`; the store adds the format and its version,
the versions of the software, the thread count, the world size, every tensor's global shape and dtype,
`files: {name: {size, sha256}}`, and `checksum`, the SHA-256 of the rest, so that a flipped digit in
`consumed_samples` is found like one in a weight. Nothing here is ever unpickled; file names that would lead
out of the directory are refused.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_lite.config.renamed import upgraded
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.global_view import Piece

MANIFEST = "manifest.json"
FORMAT = "megatron_lite"
FORMAT_VERSION = 1

# what the caller says, and the JSON type it must have
STATE_KEYS: dict[str, type] = {
    "consumed_samples": int,  # the whole data state of a position
    "adam_step": int,  # Adam's bias-correction counter
    "config": dict,
    "tokenizer": str,  # fingerprint
    "schedule": dict,
    "data": dict,  # phases as sample numbers, source fingerprints
    "rng": dict,  # rng.rng_state()
}
STORE_KEYS: dict[str, type] = {
    "format": str,
    "format_version": int,
    "step": int,
    "versions": dict,
    "threads": int,
    "world_size": int,
    "tensors": dict,
    "files": dict,
}

_STEP_NAME = re.compile(r"step_(\d{8,})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")


def step_name(step: int) -> str:
    """The directory name of a step."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a directory name, None when it is no checkpoint's."""
    found = _STEP_NAME.fullmatch(name)
    return int(found[1]) if found else None


def software_versions() -> dict[str, str]:
    """Versions that may change the numbers or the files."""
    versions = {"python": platform.python_version()}
    for package in ("megatron-lite", "torch", "numpy", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that was never installed
            continue
    return versions


def check_state(state: dict[str, Any]) -> None:
    """The caller's part has every key with the right type and is JSON. Raises ValueError naming the keys."""
    wrong = _wrong_keys(state, STATE_KEYS)
    if wrong:
        raise ValueError(f"this state cannot be saved: {'; '.join(wrong)}")
    taken = sorted(set(state) & {*STORE_KEYS, "checksum"})
    if taken:
        raise ValueError(f"the keys {taken} of a manifest are written by the store; name them otherwise")
    try:
        json.dumps(state)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the state of a checkpoint must be JSON: {error}") from error


def build(step: int, state: dict[str, Any], *, world_size: int, tensors: dict, files: dict) -> dict[str, Any]:
    """The whole manifest without its checksum."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": step,
        **state,
        "versions": software_versions(),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "tensors": tensors,
        "files": files,
    }


def encode(manifest: dict[str, Any]) -> bytes:
    """The bytes of `manifest.json`."""
    manifest = json.loads(json.dumps(manifest))  # keys become strings first: the checksum must survive the round trip
    return json.dumps({**manifest, "checksum": _checksum(manifest)}, indent=1, ensure_ascii=False).encode() + b"\n"


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read and check the manifest of a checkpoint directory; no tensor file is opened. Its config has the keys of today.

    Raises CheckpointError naming the file and what is wrong with it.
    """
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{file} is no JSON object")
    _check_manifest(file, manifest)
    return manifest | {"config": upgraded(manifest["config"])}


def _check_manifest(file: Path, manifest: dict[str, Any]) -> None:
    if manifest.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"{file} has format {manifest['format']!r}, not {FORMAT!r}")
    if manifest.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format_version {manifest['format_version']!r}; this version reads {FORMAT_VERSION}: "
            "load it with the version that wrote it"
        )
    wrong = _wrong_keys(manifest, STORE_KEYS | STATE_KEYS)
    if wrong:
        raise CheckpointError(f"{file} is incomplete: {'; '.join(wrong)}")
    expected = manifest.pop("checksum", None)
    if expected != _checksum(manifest):
        raise CheckpointError(f"{file} does not match its own checksum: it was damaged or edited")
    for name, entry in manifest["files"].items():
        if not _FILE_NAME.fullmatch(name) or not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            raise CheckpointError(f"{file} names an impossible file {name!r}")
        if not _is_count(entry["size"]) or not isinstance(entry["sha256"], str):
            raise CheckpointError(f"{file} gives the file {name!r} an impossible size or hash")
    for name, entry in manifest["tensors"].items():
        if not isinstance(entry, dict) or set(entry) != {"shape", "dtype"}:
            raise CheckpointError(f"{file} describes the tensor {name!r} without shape and dtype")
        if not isinstance(entry["shape"], list) or not all(_is_count(size) for size in entry["shape"]):
            raise CheckpointError(f"{file} gives the tensor {name!r} an impossible shape {str(entry['shape'])[:80]}")
        try:
            dtype_from(entry["dtype"])
        except ValueError as error:
            raise CheckpointError(f"{file}: the tensor {name!r} has an unknown dtype: {error}") from error


def tensor_differences(saved: dict[str, Any], wanted: dict[str, Any], *, partial: bool) -> str:
    """Names, shapes and dtypes of a checkpoint against those asked for; both `{name: {shape, dtype}}`.

    partial: tensors of the checkpoint that nobody asks for are left out without complaint.
    Returns a text with up to five of each kind, empty when there is none.
    """
    missing = [f"{name} {_entry(wanted[name])}" for name in wanted if name not in saved]
    extra = [] if partial else [f"{name} {_entry(saved[name])}" for name in saved if name not in wanted]
    other = [
        f"{name} is {_entry(saved[name])} there, {_entry(wanted[name])} here"
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    parts = [
        f"{len(found)} {what}: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}"
        for what, found in (
            ("tensors differ", other),
            ("tensors are not in the checkpoint", missing),
            ("tensors are in the checkpoint only", extra),
        )
        if found
    ]
    return "; ".join(parts)


def tensor_entry(shape: Iterable[int], dtype: torch.dtype) -> dict[str, Any]:
    """A tensor's line in the manifest."""
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}


def tensor_entries(pieces: Mapping[str, Piece]) -> dict[str, Any]:
    """The manifest's `tensors` for these pieces."""
    return {name: tensor_entry(piece.global_shape, piece.local.dtype) for name, piece in pieces.items()}


def dtype_from(name: Any) -> torch.dtype:
    """The torch dtype of a manifest's name. Raises ValueError."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype of torch {torch.__version__}")
    return dtype


def _entry(entry: dict[str, Any]) -> str:
    return f"{tuple(entry['shape'])} {entry['dtype']}"


def _wrong_keys(given: dict[str, Any], keys: dict[str, type]) -> list[str]:
    wrong = [f"no key {key!r}" for key in keys if key not in given]
    for key, kind in keys.items():
        value = given.get(key)
        if key in given and (not isinstance(value, kind) or isinstance(value, bool)):
            wrong.append(f"{key!r} is {type(value).__name__}, not {kind.__name__}")
        elif kind is int and key in given and not _is_count(value):
            wrong.append(f"{key!r} is {str(value)[:40]}, not between 0 and 2**63")
    return wrong


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _checksum(manifest: dict[str, Any]) -> str:
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
