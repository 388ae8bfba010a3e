"""Rows of a piece, one at a time, with the place of every row that cannot be used.

Notable features:
- lines are read as bytes with a limit, so a line of a gigabyte costs no more memory than an ordinary one and is reported, not loaded
- a row is either `Row` (its columns and where it stands) or `BadRow` (where and why); the caller decides what to do with either
- a damaged compressed file is told with the last line that was still whole
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson
import zstandard

from data_tools.recipe import SourceConfig
from data_tools.sources import Piece, open_dataset


@dataclass(slots=True)
class Row:
    """A row's columns. `place` is where it stands: "file:line" or "file:byte" (in a part of a file)."""

    place: str
    columns: dict[str, Any]


@dataclass(slots=True)
class BadRow:
    """A row that cannot be used, why, and its first bytes."""

    place: str
    reason: str
    head: str = ""


class DamagedFile(ValueError):
    """A file that cannot be read to its end."""


def read_piece(piece: Piece, source: SourceConfig, max_bytes: int) -> Iterator[Row | BadRow]:
    """Every row of `piece`.

    Raises:
        DamagedFile: a file is truncated or not what its name says.
    """
    if piece.type == "datasets":
        yield from _read_dataset(piece, source)
    elif piece.type == "parquet":
        for file in piece.files:
            yield from _read_parquet(Path(file), piece.start, piece.end)
    elif piece.type == "text":
        for file in piece.files:
            yield _read_text(Path(file), source.encodings, max_bytes)
    else:
        for file in piece.files:
            yield from _read_jsonl(Path(file), piece, source.encodings, max_bytes)


def open_bytes(file: Path) -> BinaryIO:
    """A file's bytes, decompressed by its suffix."""
    if file.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(file, "rb"))
    if file.suffix.lower() == ".zst":
        raw = file.open("rb")
        stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=True)
        return cast(BinaryIO, io.BufferedReader(stream, 1 << 20))
    return file.open("rb", buffering=1 << 20)


def _read_jsonl(file: Path, piece: Piece, encodings: list[str], max_bytes: int) -> Iterator[Row | BadRow]:
    part = piece.start > 0
    number, place = 0, f"{file}:1"
    try:
        with open_bytes(file) as stream:
            for at, line, size in _lines(stream, piece.start, piece.end, max_bytes):
                number += 1
                # Counting lines before a part would mean reading the whole file; a byte position is as good to find it.
                place = f"{file}:byte {at}" if part else f"{file}:{number}"
                if line is None:
                    yield BadRow(place, f"line of {size} bytes is longer than read.max_document_bytes={max_bytes}")
                elif line.strip():
                    yield _parse(place, line, encodings)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DamagedFile(f"{file} is truncated or damaged after line {number}: {error}") from None
    if file.suffix.lower() == ".zst" and not _zst_is_whole(file):
        raise DamagedFile(f"{file} is truncated: the compressed stream ends after line {number} without its end mark")


def _zst_is_whole(file: Path) -> bool:
    """Whether the last frame ends: the streaming reader takes a cut stream for an end."""
    decoder = zstandard.ZstdDecompressor().decompressobj()
    with file.open("rb") as raw:
        while chunk := raw.read(1 << 20):
            while chunk:
                decoder.decompress(chunk)
                chunk = decoder.unused_data if decoder.eof else b""
                if chunk:
                    decoder = zstandard.ZstdDecompressor().decompressobj()
    return bool(decoder.eof)


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


def _parse(place: str, line: bytes, encodings: list[str]) -> Row | BadRow:
    if line.startswith(b"\xef\xbb\xbf"):
        line = line[3:]
    text = decode(line, encodings)
    if text is None:
        return BadRow(place, f"not valid {' or '.join(encodings)}", _head(line))
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return BadRow(place, f"not JSON: {error}", _head(line))
    if not isinstance(value, dict):
        return BadRow(place, f"a JSON {type(value).__name__}, not an object", _head(line))
    return Row(place, value)


def decode(data: bytes, encodings: list[str]) -> str | None:
    """`data` in the first encoding that fits; None when none does."""
    for mark, encoding in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            encodings = [encoding, *encodings]
    for encoding in encodings:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
        except LookupError:
            raise ValueError(
                f"data_recipe.sources.*.encodings: {encoding!r} is no encoding that Python knows"
            ) from None
    return None


def _head(data: bytes) -> str:
    return data[:200].decode("utf-8", "backslashreplace").rstrip("\n")


def _read_text(file: Path, encodings: list[str], max_bytes: int) -> Row | BadRow:
    size = file.stat().st_size
    if size > max_bytes:
        return BadRow(f"{file}:1", f"file of {size} bytes is longer than read.max_document_bytes={max_bytes}")
    try:
        with open_bytes(file) as stream:
            data = stream.read(max_bytes + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DamagedFile(f"{file} is truncated or damaged: {error}") from None
    if not data:
        return BadRow(f"{file}:1", "empty file")
    if b"\0" in data[:8192] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return BadRow(f"{file}:1", "binary file", _head(data[:40]))
    text = decode(data.removeprefix(b"\xef\xbb\xbf"), encodings)
    if text is None:
        return BadRow(f"{file}:1", f"not valid {' or '.join(encodings)}", _head(data))
    return Row(f"{file}:1", {"text": text, "path": str(file), "suffix": file.suffix.lstrip(".")})


def _read_parquet(file: Path, start: int, end: int | None) -> Iterator[Row | BadRow]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file)
    groups = list(range(start, table.num_row_groups if end is None else end))
    number = sum(table.metadata.row_group(group).num_rows for group in range(start))
    try:
        for batch in table.iter_batches(batch_size=512, row_groups=groups):
            for columns in batch.to_pylist():
                number += 1
                yield Row(f"{file}:{number}", columns)
    except OSError as error:
        raise DamagedFile(f"{file} is damaged after row {number}: {error}") from None


def _read_dataset(piece: Piece, source: SourceConfig) -> Iterator[Row | BadRow]:
    dataset = open_dataset(source)
    if piece.shards > 1:
        dataset = dataset.shard(num_shards=piece.shards, index=piece.shard)
    for number, columns in enumerate(dataset, 1):
        yield Row(f"{source.path}[{source.split}] shard {piece.shard}:{number}", columns)
