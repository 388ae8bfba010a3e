"""Rows of a `Piece`, one at a time, with the location of every row that cannot be used.

Notable features:
- lines are read as bytes with a limit, so a line of a gigabyte costs no more memory than an ordinary one and is reported, not loaded
- a row is either `Row` (its columns and where it is) or `BadRow` (where and why); the caller decides what to do with either
- only the columns that the recipe names are looked at: NaN, invalid UTF-8 or an odd type in another column changes nothing
- a damaged compressed file is reported with its last complete line
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.forms import READ_ERRORS, open_bytes
from data_tools.recipe import SourceConfig
from data_tools.sources import Piece, open_dataset
from data_tools.text.encodings import decode, head, text_or_reason
from data_tools.text.json_lines import parse_line


@dataclass(slots=True)
class Row:
    """A row's columns. `place` is where it is: "file:line" or "file:byte" (in a part of a file); `size`: its bytes there."""

    place: str
    columns: dict[str, Any]
    size: int = 0


@dataclass(slots=True)
class BadRow:
    """A row that cannot be used, why, its first bytes, and how many bytes it has."""

    place: str
    reason: str
    head: str = ""
    size: int = 0


class DamagedFile(ValueError):
    """A file that cannot be read to its end."""

    def __init__(self, file: str | Path, reason: str) -> None:
        super().__init__(f"{file} {reason}")
        self.file, self.reason = str(file), reason


def read_piece(
    piece: Piece, source: SourceConfig, max_bytes: int, *, keep_damaged: bool = False
) -> Iterator[Row | BadRow]:
    """Every row of `piece`.

    keep_damaged: a file that ends too early gives its whole rows and one BadRow, and the next file is read.

    Raises:
        DamagedFile: a file is truncated or not what its name says, and `keep_damaged` is false.
    """
    if piece.type == "unusable":
        for name, reason in zip(piece.files, piece.reasons, strict=True):
            yield BadRow(name, reason)
        return
    for name in piece.files:
        try:
            if piece.type == "datasets":
                yield from _read_dataset(piece, source)
            elif piece.type == "parquet":
                yield from _read_parquet(Path(name), piece, source)
            elif piece.type == "text":
                yield _read_text(Path(name), source.encodings, max_bytes)
            else:
                yield from _read_jsonl(Path(name), piece, source, max_bytes)
        except DamagedFile as error:
            if not keep_damaged:
                raise
            yield BadRow(error.file, f"damaged file: {error}")


def _read_jsonl(file: Path, piece: Piece, source: SourceConfig, max_bytes: int) -> Iterator[Row | BadRow]:
    part = piece.start > 0
    number = 0
    try:
        with open_bytes(file) as stream:
            for at, line, size in _lines(stream, piece.start, piece.end, max_bytes):
                number += 1
                # Counting lines before a part would mean reading the whole file; a byte position is as good to find it.
                place = f"{file}:byte {at}" if part else f"{file}:{number}"
                if line is None:
                    reason = f"line of {size} bytes is longer than read.max_document_bytes={max_bytes}"
                    yield BadRow(place, reason, size=size)
                elif line.strip():
                    found = parse_line(line, source.columns.text, source.encodings)
                    if isinstance(found, str):
                        yield BadRow(place, found, head(line), size)
                    else:
                        yield Row(place, found, size)
    except READ_ERRORS as error:
        raise DamagedFile(file, f"is truncated or damaged after line {number}: {error}") from None


def _lines(stream: BinaryIO, start: int, end: int | None, limit: int) -> Iterator[tuple[int, bytes | None, int]]:
    """(position, line or None when longer than `limit`, bytes) of the lines that begin in [start, end)."""
    at = start
    if start > 0:
        stream.seek(start - 1)
        if stream.read(1) != b"\n":
            at += _skip_line(stream)
    while end is None or at < end:
        line = stream.readline(limit + 1)
        if not line:
            return
        size = len(line)
        if size > limit and not line.endswith(b"\n"):
            size += _skip_line(stream)
            yield at, None, size
        else:
            yield at, line, size
        at += size


def _skip_line(stream: BinaryIO) -> int:
    skipped = 0
    while chunk := stream.readline(1 << 20):
        skipped += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return skipped


def _read_text(file: Path, encodings: list[str], max_bytes: int) -> Row | BadRow:
    place = f"{file}:1"
    try:
        with open_bytes(file) as stream:
            data = stream.read(max_bytes + 1)
    except READ_ERRORS as error:
        raise DamagedFile(file, f"is truncated or damaged: {error}") from None
    if len(data) > max_bytes:
        size = file.stat().st_size
        return BadRow(place, f"file of {size} bytes is longer than read.max_document_bytes={max_bytes}", size=size)
    if not data:
        return BadRow(place, "empty file")
    text = decode(data.removeprefix(b"\xef\xbb\xbf"), encodings)
    if text is None:
        return BadRow(place, f"not valid {' or '.join(encodings)}", head(data), len(data))
    return Row(place, {"text": text, "path": str(file), "suffix": file.suffix.lstrip(".")}, len(data))


def _read_parquet(file: Path, piece: Piece, source: SourceConfig) -> Iterator[Row | BadRow]:
    import pyarrow.parquet as pq

    number = 0
    try:
        table = pq.ParquetFile(file)
        groups = list(range(piece.start, table.num_row_groups if piece.end is None else piece.end))
        number = sum(table.metadata.row_group(group).num_rows for group in range(piece.start))
        known = table.schema_arrow.names
        if source.columns.text not in known:
            raise ValueError(f"it has no column {source.columns.text!r}, only {known}")
        names = [name for name in _asked(source) if name in known]
        batches = table.iter_batches(batch_size=512, row_groups=groups, columns=names)
        for values in (_values(batch) for batch in batches):
            for row in zip(*values.values(), strict=True):
                number += 1
                yield _row(f"{file}:{number}", dict(zip(values, row)), source)
    except Exception as error:  # pyarrow raises its own types, OSError and ValueError
        raise DamagedFile(file, f"is damaged after row {number}: {error}") from None


def _asked(source: SourceConfig) -> list[str]:
    """The columns that the recipe names, each once."""
    columns = source.columns
    return list(dict.fromkeys(name for name in (columns.text, columns.language, columns.license, columns.id) if name))


def _values(batch: Any) -> dict[str, list[Any]]:
    """Column -> Python values; strings that are not UTF-8 (nobody checks them when Parquet is written) as bytes."""
    import pyarrow as pa

    values = {}
    for name, column in zip(batch.schema.names, batch.columns):
        try:
            values[name] = column.to_pylist()
        except UnicodeDecodeError:
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            large = pa.types.is_large_string(column.type)
            values[name] = column.cast(pa.large_binary() if large else pa.binary()).to_pylist()
    return values


def _row(place: str, columns: dict[str, Any], source: SourceConfig) -> Row | BadRow:
    """A row of a library: its text may be bytes, and a string may hold what is not a character."""
    column = source.columns.text
    value = columns.get(column)
    if not isinstance(value, str | bytes):
        return Row(place, columns)
    text, reason = text_or_reason(value, source.encodings)
    if text is None:
        return BadRow(place, f"column {column!r} {reason}", head(value), len(value))
    columns[column] = text
    return Row(place, columns, len(value))


def _read_dataset(piece: Piece, source: SourceConfig) -> Iterator[Row | BadRow]:
    dataset = open_dataset(source)
    known = getattr(dataset, "column_names", None) or ()
    if source.columns.text in known:
        dataset = dataset.select_columns([name for name in _asked(source) if name in known])
    if piece.shards > 1:
        dataset = dataset.shard(num_shards=piece.shards, index=piece.shard)
    place = f"{source.path}[{source.split}] shard {piece.shard}"
    number = 0
    try:
        for columns in dataset:
            number += 1
            yield _row(f"{place}:{number}", dict(columns), source)
    except Exception as error:  # the library raises its own types, pyarrow's, requests' and plain ones
        raise DamagedFile(place, f"cannot be read after row {number}: {error}") from error
