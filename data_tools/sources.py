"""Splits a source of the recipe into `Piece`s, which tasks can read independently.

Uncompressed JSON lines are cut into byte ranges and Parquet into row groups, so one large file feeds many workers; a compressed file, a
folder of texts or a hub dataset is read by one task a file (a hub dataset: a shard). A source with a row limit is one piece.
Files that cannot be read are one more piece, from which their names and reasons go to the quarantine.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.files import find_files
from data_tools.forms import Form, Unusable, find_form
from data_tools.recipe import ReadConfig, SourceConfig

TEXT_FILES_A_PIECE = 2_000
FILES_TOLD = 3
# Files beside the data files of a data set that are not data.
DOCUMENTATION = {
    "readme", "license", "licence", "copying", "notice", "citation", "changelog", "datasheet", "dataset_info", "dataset_infos",
    "sha256sums", "md5sums", "checksums", "_success", "_metadata", "_common_metadata",
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """What one task reads of a source: files, and of a single file the part [start, end) (bytes or row groups; None: to the end).

    `shard`, `shards`: for type=datasets, which of how many. `reasons`: for type=unusable, one a file.
    """

    source: str
    type: str
    files: tuple[str, ...]
    start: int = 0
    end: int | None = None
    shard: int = 0
    shards: int = 1
    reasons: tuple[str, ...] = ()


def plan_source(name: str, source: SourceConfig, read: ReadConfig) -> list[Piece]:
    """The pieces of one source, in order.

    Raises:
        ValueError: nothing is at the path, a file is damaged, or too many files or bytes are in a form that cannot be read.
    """
    if source.type == "datasets":
        return [
            Piece(name, "datasets", (source.path,), shard=i, shards=n) for n in [_hub_shards(source)] for i in range(n)
        ]
    usable, unusable = _sort_files(name, source)
    _refuse(name, source, read, list(usable), unusable)
    by_kind: dict[str, list[Path]] = {}
    for file, form in usable.items():
        by_kind.setdefault(form.kind, []).append(file)
    pieces: list[Piece] = []
    for kind, members in by_kind.items():
        names = tuple(map(str, members))
        if source.limit is not None:
            pieces.append(Piece(name, kind, names))
        elif kind == "text":
            step = TEXT_FILES_A_PIECE
            pieces += [Piece(name, kind, names[i : i + step]) for i in range(0, len(names), step)]
        else:
            for member in members:
                pieces += _cut(name, member, usable[member], read.shard_bytes)
    if source.limit is not None and len(pieces) > 1:
        raise ValueError(
            f"data_recipe.sources.{name}.limit={source.limit} needs files of one type, but {source.path} holds {sorted(by_kind)}; "
            f"set data_recipe.sources.{name}.type, or narrow its path"
        )
    if unusable:
        reasons = tuple(found.reason for found in unusable.values())
        pieces.append(Piece(name, "unusable", tuple(map(str, unusable)), reasons=reasons))
    return pieces


def _sort_files(name: str, source: SourceConfig) -> tuple[dict[Path, Form], dict[Path, Unusable]]:
    """The files that can be read, with their form, and those that cannot."""
    files = find_files(Path(source.path).expanduser())
    if not files:
        raise ValueError(
            f"data_recipe.sources.{name}.path={source.path}: no file there (from {Path.cwd()}; hidden files and folders are left "
            f"out); correct the path, or set data_recipe.sources.{name}.type=datasets if it is a dataset's name on the hub"
        )
    usable: dict[Path, Form] = {}
    unusable: dict[Path, Unusable] = {}
    for file in files:
        if file.is_dir():
            found: Form | Unusable = Unusable(
                "a folder, which this pattern does not enter; end the path with /** to read it"
            )
        else:
            found = find_form(file, source)
        if isinstance(found, Form) and found.kind == "parquet":
            found = _check_parquet(name, file, source) or found
        if isinstance(found, Form):
            usable[file] = found
        else:
            unusable[file] = found
    if any(form.kind != "text" for form in usable.values()):
        beside = [file for file in files if file.name.split(".")[0].lower() in DOCUMENTATION and not file.is_dir()]
        for file in beside:
            if file in unusable or usable[file].kind == "text":
                usable.pop(file, None)
                unusable[file] = Unusable(
                    "documentation beside data files; read it with a source of its own, type=text"
                )
    return usable, dict(sorted(unusable.items()))


def _refuse(
    name: str, source: SourceConfig, read: ReadConfig, usable: Sequence[Path], unusable: dict[Path, Unusable]
) -> None:
    """Stop where a run would read much less than there is: judged by files and by bytes before any of it is read."""
    key = f"data_recipe.sources.{name}"
    damaged = {file: found for file, found in unusable.items() if found.damaged}
    if damaged and read.on_damaged_file == "stop":
        raise ValueError(
            f"{key}: {_told(damaged)}; copy it again, take it out of the path, or leave it out with "
            "data_recipe.read.on_damaged_file=keep_rows"
        )
    if not usable and read.max_bad_share < 1:
        raise ValueError(f"{key}.path={source.path}: nothing there can be read: {_told(unusable)}")
    lost = {file: found for file, found in unusable.items() if found.size and not found.damaged}
    lost_bytes = sum(found.size for found in lost.values())
    total_bytes = lost_bytes + sum(file.stat().st_size for file in usable)
    if len(lost) > read.max_bad_share * (len(lost) + len(usable)) or lost_bytes > read.max_bad_share * total_bytes:
        raise ValueError(
            f"{key}: {len(lost)} of {len(lost) + len(usable)} files ({lost_bytes:,} of {total_bytes:,} bytes) in {source.path} cannot "
            f"be read: {_told(lost)}; narrow {key}.path (a glob such as *.jsonl), or leave them out with data_recipe.read.max_bad_share"
        )


def _told(unusable: dict[Path, Unusable]) -> str:
    first = [f"{file} is {found.reason}" for file, found in itertools.islice(unusable.items(), FILES_TOLD)]
    return "; ".join(first) + (f"; and {len(unusable) - FILES_TOLD} more" if len(unusable) > FILES_TOLD else "")


def _cut(name: str, file: Path, form: Form, shard_bytes: int) -> list[Piece]:
    if form.kind == "parquet":
        return [Piece(name, form.kind, (str(file),), a, b) for a, b in _row_groups(file, shard_bytes)]
    if form.compressed:
        return [Piece(name, form.kind, (str(file),))]
    size = file.stat().st_size
    count = max(1, -(-size // shard_bytes))
    edges = [size * i // count for i in range(count + 1)]
    return [Piece(name, form.kind, (str(file),), a, b) for a, b in itertools.pairwise(edges)]


def _check_parquet(name: str, file: Path, source: SourceConfig) -> Unusable | None:
    """Why a Parquet file cannot be read, by its footer."""
    import pyarrow.parquet as pq

    size = file.stat().st_size
    try:
        columns = pq.ParquetFile(file).schema_arrow.names
    except Exception as error:  # pyarrow raises its own types, OSError and ValueError
        return Unusable(f"not a whole Parquet file ({error})", size, damaged=True)
    if source.columns.text not in columns:
        key = f"data_recipe.sources.{name}.columns.text"
        return Unusable(
            f"without a column {source.columns.text!r}, it has {columns}; set {key} to the one with text", size
        )
    return None


def _row_groups(file: Path, shard_bytes: int) -> list[tuple[int, int]]:
    import pyarrow.parquet as pq

    metadata = pq.ParquetFile(file).metadata
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
