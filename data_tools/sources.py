"""From a source of the recipe to pieces that tasks can read by themselves.

Uncompressed JSONL is cut into byte ranges and Parquet into row groups, so one large file feeds many workers; a compressed file, a
folder of texts or a hub dataset is read by one task a file (a hub dataset: a shard). A source with a row limit is one piece.
"""

from __future__ import annotations

import glob
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.recipe import SourceConfig

JSONL = (".jsonl", ".json", ".ndjson")
COMPRESSED = (".gz", ".zst")
TEXT_FILES_A_PIECE = 2_000


@dataclass(frozen=True)
class Piece:
    """What one task reads of a source: files, and of a single file the part [start, end) (bytes or row groups; None: to the end).

    `shard`, `shards`: for type=datasets, which of how many.
    """

    source: str
    type: str
    files: tuple[str, ...]
    start: int = 0
    end: int | None = None
    shard: int = 0
    shards: int = 1


def plan_source(name: str, source: SourceConfig, shard_bytes: int) -> list[Piece]:
    """The pieces of one source, in order.

    Raises:
        ValueError: nothing lies at the path.
    """
    if source.type == "datasets":
        return [
            Piece(name, "datasets", (source.path,), shard=i, shards=n) for n in [_hub_shards(source)] for i in range(n)
        ]
    files = find_files(name, source)
    by_type: dict[str, list[Path]] = {}
    for file in files:
        by_type.setdefault(file_type(source, file), []).append(file)
    pieces: list[Piece] = []
    for kind, members in by_type.items():
        names = tuple(map(str, members))
        if source.limit is not None:
            pieces.append(Piece(name, kind, names))
        elif kind == "text":
            step = TEXT_FILES_A_PIECE
            pieces += [Piece(name, kind, names[i : i + step]) for i in range(0, len(names), step)]
        else:
            for member in members:
                pieces += _cut(name, kind, member, shard_bytes)
    if source.limit is not None and len(pieces) > 1:
        raise ValueError(
            f"data_recipe.sources.{name}.limit={source.limit} needs files of one type, but {source.path} holds {sorted(by_type)}; "
            f"set data_recipe.sources.{name}.type, or narrow its path"
        )
    return pieces


def find_files(name: str, source: SourceConfig) -> list[Path]:
    """The files that a path, folder or glob names, sorted; hidden files are left out."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file())
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
    found = [file for file in found if not file.name.startswith(".")]
    if not found:
        raise ValueError(
            f"data_recipe.sources.{name}.path={source.path}: no file there (from {Path.cwd()}); correct the path, or set "
            f"data_recipe.sources.{name}.type=datasets if it is a dataset's name on the hub"
        )
    return found


def file_type(source: SourceConfig, file: Path) -> str:
    """jsonl, parquet or text, from the recipe or the file's name."""
    if source.type != "auto":
        return source.type
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() not in COMPRESSED]
    last = suffixes[-1] if suffixes else ""
    if last in JSONL:
        return "jsonl"
    return "parquet" if last == ".parquet" else "text"


def _cut(name: str, kind: str, file: Path, shard_bytes: int) -> list[Piece]:
    if kind == "parquet":
        return [Piece(name, kind, (str(file),), a, b) for a, b in _row_groups(file, shard_bytes)]
    if file.suffix.lower() in COMPRESSED:
        return [Piece(name, kind, (str(file),))]
    size = file.stat().st_size
    count = max(1, -(-size // shard_bytes))
    edges = [size * i // count for i in range(count + 1)]
    return [Piece(name, kind, (str(file),), a, b) for a, b in itertools.pairwise(edges)]


def _row_groups(file: Path, shard_bytes: int) -> list[tuple[int, int]]:
    import pyarrow.parquet as pq

    try:
        metadata = pq.ParquetFile(file).metadata
    except Exception as error:
        raise ValueError(f"{file} is no whole Parquet file: {error}; copy it again or leave it out") from None
    ranges, start, size = [], 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= shard_bytes or group == metadata.num_row_groups - 1:
            ranges.append((start, group + 1))
            start, size = group + 1, 0
    return ranges


def _hub_shards(source: SourceConfig) -> int:
    if source.limit is not None:
        return 1
    return max(1, int(getattr(open_dataset(source), "num_shards", 1)))


def open_dataset(source: SourceConfig) -> Any:
    """A streaming dataset of the `datasets` library, or one saved by `save_to_disk`."""
    import datasets

    if (Path(source.path) / "dataset_info.json").is_file() or (Path(source.path) / "dataset_dict.json").is_file():
        loaded = datasets.load_from_disk(source.path)
        return loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
    try:
        return datasets.load_dataset(
            source.path, source.name, split=source.split, data_files=source.data_files, streaming=True
        )
    except Exception as error:  # the library raises its own types, requests' and plain ones
        raise ValueError(
            f"data_recipe.sources: dataset {source.path} (name={source.name}, split={source.split}) cannot be opened: {error}"
        ) from error
