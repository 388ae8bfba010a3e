"""The read step: every source into shards of equal form, with a quarantine for rows that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import orjson

from data_tools.documents import SHARD_SUFFIX, Document, ShardWriter
from data_tools.readers import BadRow, DamagedFile, Row, read_piece
from data_tools.recipe import Columns, ReadConfig, SourceConfig
from data_tools.sources import Piece
from data_tools.steps import Progress, Step, Tally
from megatron_lite.atomic import write_text

MIN_ROWS_TO_JUDGE = 20  # below that a share of bad rows says little


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
        tally, bad = Tally(0), []
        writer, part = None, 0
        try:
            for row in self._rows(piece, source):
                if isinstance(row, BadRow):
                    bad.append(row)
                    tally.count(piece.source, len(row.head), _kind(row.reason))
                    continue
                document = to_document(row, piece.source, source)
                size = len(document.text.encode())
                if writer is None:
                    writer = ShardWriter(self.folder / f"{rank:05d}-{part:05d}{SHARD_SUFFIX}").__enter__()
                    part += 1
                writer.write(document)
                tally.count(piece.source, size)
                progress.add(size)
                if writer.text_bytes >= self.settings.shard_bytes:
                    writer.__exit__(None, None, None)
                    writer = None
        except BaseException as error:
            if writer is not None:
                writer.__exit__(type(error), error, error.__traceback__)
            raise
        if writer is not None:
            writer.__exit__(None, None, None)
        self._finish(rank, tally, bad)

    def _rows(self, piece: Piece, source: SourceConfig) -> Iterator[Row | BadRow]:
        """Rows that are documents, up to the source's limit; unusable ones as BadRow."""
        count = 0
        try:
            for row in read_piece(piece, source, self.settings.max_document_bytes):
                checked = row if isinstance(row, BadRow) else check(row, source.columns, piece.source, first=count == 0)
                if (
                    isinstance(checked, Row)
                    and len(checked.columns[source.columns.text]) > self.settings.max_document_bytes
                ):
                    size = len(checked.columns[source.columns.text])
                    checked = BadRow(row.place, f"text of {size} characters is longer than read.max_document_bytes")
                yield checked
                count += isinstance(checked, Row)
                if count == source.limit:
                    return
        except DamagedFile as error:
            if self.settings.on_damaged_file == "stop":
                raise ValueError(
                    f"{error}; copy it again, take it out of data_recipe.sources.{piece.source}, or keep what can be read with "
                    "data_recipe.read.on_damaged_file=keep_rows"
                ) from None
            yield BadRow(str(error).split(" ")[0], f"damaged file: {error}")

    def _finish(self, rank: int, tally: Tally, bad: list[BadRow]) -> None:
        rows = tally.documents_in
        if rows >= MIN_ROWS_TO_JUDGE and len(bad) > self.settings.max_bad_share * rows:
            first = bad[0]
            raise ValueError(
                f"data_recipe.sources.{self.pieces[rank].source}: {len(bad)} of {rows} rows cannot be used, first {first.place}: "
                f"{first.reason}; check the source's columns and encodings, or raise data_recipe.read.max_bad_share"
            )
        lines = [json.dumps({"place": b.place, "reason": b.reason, "head": b.head}, ensure_ascii=False) for b in bad]
        write_text(self.folder / f"{rank:05d}.quarantine.jsonl", "".join(f"{line}\n" for line in lines))
        tally.save(self.folder, rank)


def check(row: Row, columns: Columns, source: str, *, first: bool) -> Row | BadRow:
    """`row`, or why it is none. A first row without the text column means a wrong mapping, which stops the run.

    Raises:
        ValueError: naming the file, the line and the columns that there are.
    """
    if columns.text not in row.columns:
        if first:
            raise ValueError(
                f"{row.place} has no column {columns.text!r}, it has {sorted(row.columns)}; set "
                f"data_recipe.sources.{source}.columns.text to the one that holds the text"
            )
        return BadRow(row.place, f"no column {columns.text!r}", str(sorted(row.columns)))
    text = row.columns[columns.text]
    if not isinstance(text, str):
        return BadRow(row.place, f"column {columns.text!r} holds a {type(text).__name__}, not text", str(text)[:200])
    if not text.strip():
        return BadRow(row.place, "empty text")
    return row


def to_document(row: Row, name: str, source: SourceConfig) -> Document:
    """A row as a document of its source; values of the row go before those of the source."""
    columns = source.columns

    def pick(column: str, default: str) -> str:
        value = row.columns.get(column) if column else None
        return str(value) if value not in (None, "") else default

    text = row.columns[columns.text]
    return Document(
        text=text if is_encodable(text) else text.encode("utf-8", "replace").decode(),
        id=f"{name}/{pick(columns.id, row.place)}",
        source=name,
        group=source.group,
        kind=source.kind,
        language=pick(columns.language, source.language),
        license=pick(columns.license, source.license),
        dataset=source.dataset,
    )


def is_encodable(text: str) -> bool:
    """Whether a string is free of lone surrogates (JSON's `\\ud800` makes them)."""
    try:
        orjson.dumps(text)
    except TypeError:
        return False
    return True


def _kind(reason: str) -> str:
    """The part of a reason that is the same for many rows."""
    for word in ("not JSON", "not valid", "longer than", "no column", "empty", "binary", "damaged"):
        if word in reason:
            return f"quarantine: {word}"
    return "quarantine: other"
