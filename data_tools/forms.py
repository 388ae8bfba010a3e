"""The format of a file, by its name and its first bytes: JSON lines, Parquet or text, compressed or not, or why it cannot be
read.

Notable features:
- compression is recognized by its first bytes, so a wrong suffix does no harm; a compressed stream that ends too early raises
- what is not data in a form that we read (a CSV table, an archive, a picture, a Git LFS pointer) is named, never read as text
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson
import zstandard

from data_tools.recipe import SourceConfig

HEAD_BYTES = 1 << 16
JSONL = (".jsonl", ".json", ".ndjson", ".jl")
PARQUET = (".parquet", ".pq", ".parq")
COMPRESSED = (".gz", ".zst", ".zstd", ".bz2", ".xz", ".lzma")
MAX_WINDOW = 1 << 31  # of zstd, as `zstd --long=31` makes it
READ_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)

_BY_DATASETS = "read it with type=datasets, path={builder} and data_files=<the files>"
_UNPACK = "unpack it"
_EXTRACT = "extract its text first"
# Suffix -> what such a file is, and the way out.
_OTHER_FORMS = {
    **dict.fromkeys((".csv", ".tsv", ".psv"), ("a table of delimited values", _BY_DATASETS.format(builder="csv"))),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), ("an Arrow file", _BY_DATASETS.format(builder="arrow"))),
    **dict.fromkeys((".avro", ".orc", ".tfrecord", ".tfrecords", ".mds"), ("a record file", "convert it to Parquet")),
    **dict.fromkeys((".warc", ".wet", ".wat"), ("a web archive", _EXTRACT)),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"), ("an archive", _UNPACK)),
    **dict.fromkeys((".lz4", ".br", ".z", ".sz", ".snappy", ".lzo"), ("compressed in a form that is not read", _UNPACK)),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), ("a spreadsheet", "save it as Parquet or JSON lines")),
    **dict.fromkeys((".pdf", ".epub", ".doc", ".docx", ".odt", ".rtf", ".mobi", ".djvu"), ("a document", _EXTRACT)),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3", ".duckdb"), ("a database", "export it as Parquet or JSON lines")),
    **dict.fromkeys((".h5", ".hdf5", ".npy", ".npz", ".pkl", ".pickle", ".pt", ".safetensors"), ("an array file", _EXTRACT)),
    **dict.fromkeys(
        (".part", ".partial", ".incomplete", ".crdownload", ".aria2", ".tmp"),
        ("a download that did not finish", "fetch it again"),
    ),
}  # fmt: skip
_MAGIC = (
    (b"ARROW1", *_OTHER_FORMS[".arrow"]), (b"\xff\xff\xff\xff", *_OTHER_FORMS[".arrow"]), (b"FEA1", *_OTHER_FORMS[".arrow"]),
    (b"Obj\x01", "an Avro file", "convert it to Parquet"),
    (b"PK\x03\x04", *_OTHER_FORMS[".zip"]), (b"7z\xbc\xaf", *_OTHER_FORMS[".zip"]), (b"Rar!", *_OTHER_FORMS[".zip"]),
    (b"\x04\x22\x4d\x18", *_OTHER_FORMS[".lz4"]), (b"\x1f\x9d", *_OTHER_FORMS[".lz4"]), (b"\xff\x06\x00\x00sNaPpY", *_OTHER_FORMS[".lz4"]),
    (b"%PDF", *_OTHER_FORMS[".pdf"]), (b"SQLite format 3", *_OTHER_FORMS[".db"]), (b"\x89HDF", *_OTHER_FORMS[".h5"]),
    (b"\x93NUMPY", *_OTHER_FORMS[".h5"]),
)  # fmt: skip


@dataclass(frozen=True)
class Form:
    """How a file is read: `kind` is jsonl, parquet or text."""

    kind: str
    compressed: bool = False


@dataclass(frozen=True)
class Unusable:
    """Why a file cannot be read and what to do; `size` is what is lost in bytes, `damaged` says that it should have been readable."""

    reason: str
    size: int = 0
    damaged: bool = False


def known_name(file: Path) -> bool:
    """Whether the name alone says that a file holds rows."""
    return _suffix(file) in (*JSONL, *PARQUET)


def find_form(file: Path, source: SourceConfig) -> Form | Unusable:
    """What `file` is; of `source` count its type and the name of its text column."""
    try:
        size = file.stat().st_size
        with file.open("rb") as raw:
            head = raw.read(HEAD_BYTES)
    except FileNotFoundError:
        return Unusable(
            f"a link to {file.readlink()}, which does not exist; fetch that file, or remove the link", damaged=True
        )
    except OSError as error:
        return Unusable(f"unreadable ({error.strerror}); make it readable, or leave it out", damaged=True)
    if (pointer := _pointer(head)) is not None:
        return pointer
    compressed = bool(_opener(head[:10]))
    content = head
    if compressed:
        try:
            with open_bytes(file) as stream:
                content = stream.read(HEAD_BYTES)
        except READ_ERRORS:
            content = b""  # the reader says how far a damaged file goes
    if source.type == "auto" and _suffix(file) in _OTHER_FORMS:
        what, way_out = _OTHER_FORMS[_suffix(file)]
        return Unusable(f"{what}; {way_out}, or leave it out", size)
    for magic, what, way_out in _MAGIC:
        if content.startswith(magic):
            return Unusable(f"{what}; {way_out}, or leave it out", size)
    if content[257:262] == b"ustar":
        return Unusable(f"an archive; {_UNPACK}, or leave it out", size)
    kind = _kind(file, source)
    if reason := _mismatch(kind, content, source, compressed=compressed):
        return Unusable(reason, size)
    return Form(kind, compressed)


def _kind(file: Path, source: SourceConfig) -> str:
    if source.type != "auto":
        return source.type
    suffix = _suffix(file)
    return "jsonl" if suffix in JSONL else "parquet" if suffix in PARQUET else "text"


def _suffix(file: Path) -> str:
    """The last suffix that does not name a compression, in small letters."""
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() not in COMPRESSED]
    return suffixes[-1] if suffixes else ""


def _pointer(head: bytes) -> Unusable | None:
    """Git LFS and git-annex leave a few lines of text where a file's content was not fetched."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        size = re.search(rb"^size (\d+)$", head, re.MULTILINE)
        return Unusable(
            "a Git LFS pointer, not the file; run `git lfs pull` in its repository", int(size[1]) if size else 1
        )
    if head.startswith(b"/annex/objects/"):
        return Unusable("a git-annex pointer, not the file; run `git annex get` in its repository", 1)
    return None


def _mismatch(kind: str, content: bytes, source: SourceConfig, *, compressed: bool) -> str:
    """Why content is not what `kind` says; empty if it may be."""
    start = content.removeprefix(b"\xef\xbb\xbf").lstrip()
    binary = b"\0" in content[:8192] and not content.startswith((b"\xff\xfe", b"\xfe\xff"))
    if kind == "parquet":
        if compressed:
            return f"a compressed Parquet file; {_UNPACK}"
        return "" if content.startswith(b"PAR1") else "not a Parquet file; copy it again, or correct the source's type"
    if content.startswith(b"PAR1"):
        return "a Parquet file; set the source's type=parquet, or name it .parquet"
    first_line = start.split(b"\n", 1)[0].strip()
    if kind == "jsonl":
        if start.startswith(b"["):
            return f"a JSON array, not JSON lines; {_BY_DATASETS.format(builder='json')}"
        if first_line == b"{":
            return "one JSON object over several lines, not JSON lines; write one object a line, or leave it out"
        if binary and not start.startswith(b"{"):
            return "a binary file; leave it out"
        return "" if not content.startswith((b"\xff\xfe", b"\xfe\xff")) else "UTF-16 text; convert it to UTF-8"
    if binary:
        return "a binary file; leave it out"
    if source.type == "auto" and _is_row(first_line, source.columns.text):
        return "JSON lines; set the source's type=jsonl, or name it .jsonl"
    return ""


def _is_row(line: bytes, column: str) -> bool:
    if not line.startswith(b"{"):
        return False
    try:
        return column in orjson.loads(line)
    except orjson.JSONDecodeError:
        return False


def open_bytes(file: Path) -> BinaryIO:
    """A file's bytes, decompressed if its first bytes say that they are compressed.

    Reading raises one of READ_ERRORS where a compressed stream is damaged or ends too early.
    """
    with file.open("rb") as raw:
        opener = _opener(raw.read(10))
    return opener(file) if opener else file.open("rb", buffering=1 << 20)


def _opener(head: bytes) -> Callable[[Path], BinaryIO] | None:
    """What opens a compressed file that begins with `head`; None for one that is not compressed."""
    if head.startswith(b"\x1f\x8b"):
        return lambda file: cast(BinaryIO, gzip.open(file))
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return lambda file: cast(BinaryIO, bz2.open(file))
    if head.startswith((b"\xfd7zXZ\0", b"]\0\0")):
        return lambda file: cast(BinaryIO, lzma.open(file))
    # A zstd stream may begin with a skippable frame.
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F):
        return lambda file: cast(BinaryIO, io.BufferedReader(_ZstdStream(file), 1 << 20))
    return None


class _ZstdStream(io.RawIOBase):
    """Plain bytes of all frames of a zstd file; EOFError if the last one does not end (zstandard's own reader takes that for an end)."""

    STEP = 1 << 10  # compressed bytes at a time: they may become 30,000 times as many

    def __init__(self, file: Path) -> None:
        self._below = file.open("rb")
        self._decoder: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._decoder.unused_data if self._decoder and self._decoder.eof else b""
            if not data and not (data := self._below.read(self.STEP)):
                if self._decoder is not None and not self._decoder.eof:
                    raise EOFError("the compressed stream ends without its end mark")
                return 0
            if self._decoder is None or self._decoder.eof:
                self._decoder = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
            self._ready = memoryview(self._decoder.decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        super().close()
        self._below.close()
