"""`manifest.json`: everything of a checkpoint that is not a tensor, and which files hold the tensors.

A manifest is a JSON object. The caller's part is `STATE_KEYS`; the store adds the format and its version,
the versions of the software, the thread count, the world size, and

    tensors: {name: {shape, dtype, group}}   global shape
    groups:  {group: [[dim, parts], ...]}    the tensors of a group are all cut in the same way, in this order
    files:   {file: {size, blocks_sha256}}   `<group>-<number>.safetensors` holds shard `number` of each of them

so that a reader computes where a slice is (`global_view.shards_within`) and the manifest grows with the
number of tensors and files, not with their product. `checksum` is the SHA-256 of the rest, so that a flipped
digit in `consumed_samples` is found like one in a weight. Nothing here is ever unpickled; file names that
would lead out of the directory are refused.

Format 1 had no groups (the files' headers say where each shard begins), `adam_step` instead of `counters`
and the SHA-256 of whole files (`sha256`) instead of that of their blocks (`block_hash.BlockHash`); it is
read as if it had been written in format 2, except for `format_version`.
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
FORMAT_VERSION = 2

# what the caller says, and the JSON type it must have
STATE_KEYS: dict[str, type] = {
    "consumed_samples": int,  # the whole data state of a position
    "counters": dict,  # the engine's: name -> count
    "config": dict,
    "tokenizer": str,  # fingerprint
    "schedule": dict,
    "data": dict,  # phases as sample numbers, source fingerprints
    "rng": dict,  # rng.rng_state()
}
# what a checkpoint of an earlier version lacks; `_with_defaults` says what it stands for there
LATER_KEYS: dict[str, type] = {
    "consumed_tokens": int,
    "lineage": list,  # see training/lineage.py
    "skipped_samples": list,  # see training/spikes.py
    "teacher": dict,  # path and identity of the model that the run learns from, see training/teacher.py
}
STORE_KEYS: dict[str, type] = {
    "format": str,
    "format_version": int,
    "step": int,
    "versions": dict,
    "threads": int,
    "world_size": int,
    "tensors": dict,
    "groups": dict,
    "files": dict,
}
# what format 1 had instead
_KEYS_1 = ({key: kind for key, kind in (STORE_KEYS | STATE_KEYS).items() if key not in ("groups", "counters")}) | {
    "adam_step": int
}

_STEP_NAME = re.compile(r"step_(\d{8,})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")
_GROUP_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]*")


def step_name(step: int) -> str:
    """The directory name of a step."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a directory name, None when it is not a checkpoint's."""
    found = _STEP_NAME.fullmatch(name)
    return int(found[1]) if found else None


def file_name(group: str, index: int) -> str:
    """The file with shard `index` of the tensors of a group."""
    return f"{group}-{index:05d}.safetensors"


def group_of(file: str) -> str:
    """The group whose shards a file holds."""
    return file.rsplit("-", 1)[0]


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
    wrong = _wrong_keys(state, STATE_KEYS) or _wrong_counters(state["counters"]) or _wrong_later_keys(state)
    if wrong:
        raise ValueError(f"this state cannot be saved: {'; '.join(wrong)}")
    taken = sorted(set(state) & {*STORE_KEYS, "checksum"})
    if taken:
        raise ValueError(f"the keys {taken} of a manifest are written by the store; name them otherwise")
    try:
        json.dumps(state)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the state of a checkpoint must be JSON: {error}") from error


def build(step: int, state: dict[str, Any], *, world_size: int, held: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The whole manifest without its checksum. held: `tensors`, `groups` and `files`."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": step,
        **state,
        "versions": software_versions(),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        **held,
    }


def encode(manifest: dict[str, Any]) -> bytes:
    """The bytes of `manifest.json`."""
    manifest = json.loads(json.dumps(manifest))  # keys become strings first: the checksum must survive the round trip
    return json.dumps({**manifest, "checksum": _checksum(manifest)}, indent=1, ensure_ascii=False).encode() + b"\n"


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read and check the manifest of a checkpoint directory; no tensor file is opened. Its config has the current keys.

    Raises CheckpointError naming the file and what is wrong with it.
    """
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    _check_manifest(file, manifest)
    return _with_defaults(manifest) | {"config": upgraded(manifest["config"])}


def _with_defaults(manifest: dict[str, Any]) -> dict[str, Any]:
    """With the keys that came after this checkpoint. Until then the sequence length of a run was taken to be the same all along."""
    seq_len = manifest["data"].get("seq_len", 0)  # converted weights have no data
    tokens = manifest["consumed_samples"] * seq_len if _is_count(seq_len) else 0
    return {"consumed_tokens": tokens, "lineage": [], "skipped_samples": [], "teacher": {}} | manifest


def identity(manifest: dict[str, Any]) -> str:
    """An identity of a checkpoint that does not depend on its path: a hash of its position and of its files' hashes."""
    what = {key: manifest[key] for key in ("step", "consumed_samples", "files")}
    return _checksum(what)[:16]


def _check_manifest(file: Path, manifest: dict[str, Any]) -> None:
    """Raise CheckpointError for what no version of this software wrote; bring format 1 into the form of format 2."""
    if manifest.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"{file} has format {manifest['format']!r}, not {FORMAT!r}")
    version = manifest.get("format_version", FORMAT_VERSION)
    if version not in (1, FORMAT_VERSION) or isinstance(version, bool):
        raise CheckpointError(
            f"{file} has format_version {version!r}; this version reads 1 and {FORMAT_VERSION}: "
            "load it with the version that wrote it"
        )
    wrong = _wrong_keys(manifest, _KEYS_1 if version == 1 else STORE_KEYS | STATE_KEYS)
    if wrong:
        raise CheckpointError(f"{file} is incomplete: {'; '.join(wrong)}")
    expected = manifest.pop("checksum", None)
    if expected != _checksum(manifest):
        raise CheckpointError(f"{file} does not match its own checksum: it was damaged or edited")
    if version == 1:
        manifest["counters"] = {"adam_step": manifest.pop("adam_step")}
    if wrong := _wrong_counters(manifest["counters"]) + _wrong_later_keys(manifest):
        raise CheckpointError(f"{file} is incomplete: {'; '.join(wrong)}")
    digest = "sha256" if version == 1 else "blocks_sha256"
    for name, entry in manifest["files"].items():
        if not _FILE_NAME.fullmatch(name) or not isinstance(entry, dict) or set(entry) != {"size", digest}:
            raise CheckpointError(f"{file} names an impossible file {name!r}")
        if not _is_count(entry["size"]) or not isinstance(entry[digest], str):
            raise CheckpointError(f"{file} gives the file {name!r} an impossible size or hash")
    groups = manifest.get("groups", {})
    for name, cuts in groups.items():
        if not _GROUP_NAME.fullmatch(name) or not isinstance(cuts, list) or not all(map(_is_cut, cuts)):
            raise CheckpointError(f"{file} describes an impossible group {name!r}: {str(cuts)[:80]}")
    for name, entry in manifest["tensors"].items():
        _check_tensor(file, name, entry, None if version == 1 else groups)


def _check_tensor(file: Path, name: str, entry: Any, groups: dict[str, Any] | None) -> None:
    keys = {"shape", "dtype"} if groups is None else {"shape", "dtype", "group"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise CheckpointError(f"{file} describes the tensor {name!r} without {', '.join(sorted(keys))}")
    if not isinstance(entry["shape"], list) or not all(_is_count(size) for size in entry["shape"]):
        raise CheckpointError(f"{file} gives the tensor {name!r} an impossible shape {str(entry['shape'])[:80]}")
    try:
        dtype_from(entry["dtype"])
    except ValueError as error:
        raise CheckpointError(f"{file}: the tensor {name!r} has an unknown dtype: {error}") from error
    if groups is not None:
        cuts = groups.get(entry["group"]) if isinstance(entry["group"], str) else None
        if cuts is None or any(dim >= len(entry["shape"]) for dim, _ in cuts):
            raise CheckpointError(f"{file} gives the tensor {name!r} an impossible group {str(entry['group'])[:80]!r}")


def tensor_differences(saved: dict[str, Any], pieces: Mapping[str, Piece], *, extra: Iterable[str]) -> str:
    """Names, shapes and dtypes of a checkpoint (its `tensors`) against those of `pieces`.

    extra: names in the checkpoint that no rank asks for.
    Returns a text with up to five of each kind, empty when there is none.
    """
    wanted = {name: _entry(tensor_entry(piece)) for name, piece in pieces.items()}
    missing = [f"{name} {entry}" for name, entry in wanted.items() if name not in saved]
    extra = [f"{name} {_entry(saved[name])}" for name in extra]
    other = [
        f"{name} is {_entry(saved[name])} there, {entry} here"
        for name, entry in wanted.items()
        if name in saved and _entry(saved[name]) != entry
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


def tensor_entry(piece: Piece) -> dict[str, Any]:
    """The manifest's entry for a tensor."""
    return {"shape": list(piece.global_shape), "dtype": str(piece.dtype).removeprefix("torch.")}


def dtype_from(name: Any) -> torch.dtype:
    """The torch dtype of a manifest's name. Raises ValueError."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype of torch {torch.__version__}")
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


def _wrong_later_keys(given: dict[str, Any]) -> list[str]:
    wrong = _wrong_keys(given, {key: kind for key, kind in LATER_KEYS.items() if key in given})
    return wrong + [
        f"{key!r} is not a list of objects"
        for key in ("lineage", "skipped_samples")
        if not wrong and not all(isinstance(entry, dict) for entry in given.get(key, []))
    ]


def _wrong_counters(counters: dict[str, Any]) -> list[str]:
    return [
        f"{name!r} is {str(value)[:40]}, not between 0 and 2**63"
        for name, value in counters.items()
        if not _is_count(value)
    ]


def _is_cut(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)) and value[1] > 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _checksum(manifest: dict[str, Any]) -> str:
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
