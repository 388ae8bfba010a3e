"""The read step: every source into shards of equal form, with a quarantine for rows that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.documents import SHARD_SUFFIX, Document, ShardWriter, stats_path
from data_tools.readers import BadRow, DamagedFile, Row, read_piece
from data_tools.recipe import Columns, ReadConfig, SourceConfig
from data_tools.sources import Piece
from data_tools.steps import Progress, Step, Tally
from data_tools.text.encodings import head, printable
from megatron_lite.atomic import atomic_path, read_json

MIN_ROWS_TO_JUDGE = 20  # below that a share of bad rows says little


@dataclass
class Counts:
    """Rows of a piece or a source and their bytes in the files, and how many of both cannot be used."""

    rows: int = 0
    bytes: int = 0
    bad_rows: int = 0
    bad_bytes: int = 0
    first: str = ""  # bad row: place and reason

    def add(self, row: Row | BadRow) -> None:
        """Count one row."""
        self.rows += 1
        self.bytes += row.size
        if isinstance(row, BadRow):
            self.bad_rows += 1
            self.bad_bytes += row.size
            self.first = self.first or f"{row.place}: {row.reason}"

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.rows + other.rows,
            self.bytes + other.bytes,
            self.bad_rows + other.bad_rows,
            self.bad_bytes + other.bad_bytes,
            self.first or other.first,
        )

    def refuse(self, source: str, share: float, *, by_bytes: bool) -> None:
        """Raises ValueError if more than `share` of the rows (of the bytes) cannot be used."""
        many = self.rows >= MIN_ROWS_TO_JUDGE and self.bad_rows > share * self.rows
        if many or (by_bytes and self.bad_bytes > share * self.bytes):
            raise ValueError(
                f"data_recipe.sources.{source}: {self.bad_rows} of {self.rows} rows cannot be used ({self.bad_bytes:,} of {self.bytes:,} "
                f"bytes), first {self.first}; check the source's columns and encodings, or raise data_recipe.read.max_bad_share"
            )


@dataclass
class ReadStep(Step):
    """One task a piece; writes `<task>-<part>.jsonl.zst` shards and `<task>.quarantine.jsonl`."""

    settings: ReadConfig
    sources: dict[str, SourceConfig]
    pieces: list[Piece]

    def tasks(self) -> int:
        """One a piece."""
        return len(self.pieces)

    def run_task(self, rank: int, progress: Progress) -> None:
        """Read piece `rank`."""
        piece = self.pieces[rank]
        source = self.sources[piece.source]
        for stale in self.folder.glob(f"{rank:05d}-*"):  # of a task that was killed: it may have had more parts
            stale.unlink()
        tally, counts = Tally(0), Counts()
        bad = _quarantine(self.folder / f"{rank:05d}.quarantine.jsonl")
        with bad as set_aside, _Shards(self.folder, rank, self.settings.shard_bytes) as shards:
            for row in self._rows(piece, source):
                counts.add(row)
                if isinstance(row, BadRow):
                    set_aside(row)
                    tally.count(piece.source, row.size, _kind(row.reason))
                else:
                    document = to_document(row, piece.source, source)
                    size = len(document.text.encode())
                    shards.write(document)
                    tally.count(piece.source, size)
                    progress.add(size)
            if piece.type != "unusable":  # those were judged when the source was planned
                counts.refuse(piece.source, self.settings.max_bad_share, by_bytes=False)
        tally.save(self.folder, rank, read=asdict(counts))

    def finish(self) -> None:
        """Judge every source as a whole: many small files with a bad row each, or one line that holds most of the bytes."""
        for name in self.sources:
            total = Counts()
            for rank, piece in enumerate(self.pieces):
                if piece.source == name and piece.type != "unusable":
                    total += Counts(**read_json(stats_path(self.folder, rank))["read"])
            total.refuse(name, self.settings.max_bad_share, by_bytes=True)

    def _rows(self, piece: Piece, source: SourceConfig) -> Iterator[Row | BadRow]:
        """Rows that are documents, up to the source's limit; unusable ones as BadRow."""
        count, most = 0, self.settings.max_document_bytes
        keep = self.settings.on_damaged_file == "keep_rows"
        try:
            for row in read_piece(piece, source, most, keep_damaged=keep):
                checked = row if isinstance(row, BadRow) else check(row, source.columns, piece.source, most)
                yield checked
                count += isinstance(checked, Row)
                if count == source.limit:
                    return
        except DamagedFile as error:
            raise ValueError(
                f"{error}; copy it again, take it out of data_recipe.sources.{piece.source}, or keep what can be read with "
                "data_recipe.read.on_damaged_file=keep_rows"
            ) from None


@contextmanager
def _quarantine(path: Path) -> Iterator[Callable[[BadRow], None]]:
    """Writes bad rows as JSON lines; the file is visible under its name only when all are written."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:

        def write(row: BadRow) -> None:
            value = {"place": row.place, "reason": row.reason, "head": row.head}
            file.write(json.dumps(value, ensure_ascii=False) + "\n")

        yield write


class _Shards:
    """Documents in shards of about `shard_bytes` of text; a new one begins when one is full."""

    def __init__(self, folder: Path, rank: int, shard_bytes: int) -> None:
        self.folder, self.rank, self.shard_bytes = folder, rank, shard_bytes
        self._part = 0
        self._writer: ShardWriter | None = None

    def __enter__(self) -> _Shards:
        return self

    def write(self, document: Document) -> None:
        """Append one document."""
        if self._writer is None:
            path = self.folder / f"{self.rank:05d}-{self._part:05d}{SHARD_SUFFIX}"
            self._writer = ShardWriter(path).__enter__()
            self._part += 1
        self._writer.write(document)
        if self._writer.text_bytes >= self.shard_bytes:
            self.__exit__(None, None, None)

    def __exit__(self, *error: Any) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.__exit__(*error)


def check(row: Row, columns: Columns, source: str, max_bytes: int) -> Row | BadRow:
    """`row`, or why it cannot be used."""
    if columns.text not in row.columns:
        reason = (
            f"no column {columns.text!r}, only {sorted(row.columns)}: see data_recipe.sources.{source}.columns.text"
        )
        return BadRow(row.place, reason, size=row.size)
    text = row.columns[columns.text]
    if not isinstance(text, str):
        reason = f"column {columns.text!r} holds a {type(text).__name__}, not text"
        return BadRow(row.place, reason, head(str(text)), row.size)
    if not text.strip():
        return BadRow(row.place, "empty text", size=row.size)
    if len(text) > max_bytes:
        reason = f"text of {len(text)} characters is longer than read.max_document_bytes={max_bytes}"
        return BadRow(row.place, reason, size=row.size)
    return row


def to_document(row: Row, name: str, source: SourceConfig) -> Document:
    """A row as a document of its source; values of the row go before those of the source."""
    columns = source.columns

    def pick(column: str, default: str) -> str:
        return _label(row.columns.get(column)) or default

    return Document(
        text=row.columns[columns.text],
        id=f"{name}/{pick(columns.id, printable(row.place))}",
        source=name,
        group=source.group,
        kind=source.kind,
        language=pick(columns.language, source.language),
        license=pick(columns.license, source.license),
        dataset=source.dataset,
    )


def _label(value: Any) -> str:
    """A value beside the text as a label; empty for what says nothing (null, NaN, a nested value)."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(_label, value)))
    if value is None or isinstance(value, dict) or value != value:  # the last: NaN
        return ""
    return printable(str(value))


def _kind(reason: str) -> str:
    """The part of a reason that is the same for many rows."""
    for word in ("not JSON", "not valid", "half a character", "longer than", "no column", "empty", "damaged"):
        if word in reason:
            return f"quarantine: {word}"
    return "quarantine: other"
