"""Megatron's `.bin/.idx` token files: reading (memory-mapped) and writing (streaming, atomic).

    <prefix>.bin   the tokens of all sequences, one after another, nothing between them
    <prefix>.idx   magic b"MMIDIDX\\0\\0", u64 version = 1, u8 dtype code, u64 sequences S, u64 entries D + 1
                   int32  tokens of each sequence       (S)
                   int64  byte offset of each sequence  (S)
                   int64  first sequence of each document, then S  (D + 1)

All integers are little-endian; the layout is that of Megatron Core's `core/datasets/indexed_dataset.py`.

Notable features
- Opening reads a header and a handful of numbers, whatever the size: 10^8 documents open as fast as ten.
- A truncated, foreign or mismatching pair is refused with what is wrong, before training starts.
- The writer works under temporary names and renames at the end, the index last: a half-written file never
  looks whole.
"""

from __future__ import annotations

import os
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, length of the document index

# Megatron's codes 6 and 7 are float64 and float32, which hold no tokens.
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
POINTER_CHUNK = 1 << 20  # documents whose pointers are computed at a time when an index is written


def best_dtype(vocab_size: int) -> np.dtype:
    """The dtype for token ids below `vocab_size` by Megatron's rule: uint16 below 65,500, else int32."""
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


def bin_path(prefix: str | Path) -> Path:
    """The token file of a prefix."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index file of a prefix."""
    return Path(f"{prefix}.idx")


class IndexedDataset:
    """The token stream of a `.bin/.idx` pair, memory-mapped.

    Sequences follow one another without gaps, so the file is one flat stream of `num_tokens` tokens in which
    documents begin at known places. Opening costs O(1) time and memory.

    Raises:
        ValueError: a file is missing, empty, truncated, of another format, or the two do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        index, tokens = idx_path(prefix), bin_path(prefix)
        for path in (index, tokens):
            _require_content(path)
        self._index = np.memmap(index, dtype=np.uint8, mode="r").view(np.ndarray)
        self.dtype, self.num_sequences, entries = _read_header(index, self._index)
        self.num_documents = entries - 1
        offset = HEADER.size
        self._lengths = np.frombuffer(self._index, "<i4", self.num_sequences, offset)
        offset += self._lengths.nbytes
        self._pointers = np.frombuffer(self._index, "<i8", self.num_sequences, offset)
        offset += self._pointers.nbytes
        self._documents = np.frombuffer(self._index, "<i8", entries, offset)
        self._check_ends(tokens.stat().st_size)
        self._tokens = np.memmap(tokens, dtype=self.dtype, mode="r").view(np.ndarray)
        self.num_tokens = len(self._tokens)

    def _check_ends(self, bin_size: int) -> None:
        """Compare the ends of the index with each other and with the size of the token file."""
        index = idx_path(self.prefix)
        first, last = int(self._documents[0]), int(self._documents[-1])
        if first != 0 or last != self.num_sequences:
            raise ValueError(
                f"{index}: the document index runs from {first} to {last}, but it must run from 0 to the "
                f"{self.num_sequences} sequences of the header; the file is damaged, tokenize the source "
                "again"
            )
        start, end = int(self._pointers[0]), int(self._pointers[-1])
        expected = end + int(self._lengths[-1]) * self.dtype.itemsize
        if start != 0 or expected != bin_size:
            raise ValueError(
                f"{bin_path(self.prefix)}: {bin_size} bytes, but the index {index} describes bytes {start} "
                f"to {expected}; one of the two is truncated or belongs to another file: copy both again, "
                "or tokenize the source again"
            )

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.integer]:
        """Tokens [start, stop) of the stream as a read-only view of the map, in the file's own dtype."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"{self.prefix}: tokens [{start}, {stop}) are outside of [0, {self.num_tokens})")
        return self._tokens[start:stop]

    def document_start(self, document: int) -> int:
        """Where the first token of `document` is; for `num_documents`, the end of the stream."""
        sequence = self._documents[document]
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def document_lengths(self) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """(first token, number of tokens) of all documents, in pieces of up to POINTER_CHUNK: this reads the whole index."""
        for begin in range(0, self.num_documents, POINTER_CHUNK):
            sequences = self._documents[begin : min(begin + POINTER_CHUNK, self.num_documents) + 1]
            # behind the last sequence is the end of the stream
            inner = sequences[sequences < self.num_sequences]
            starts = np.full(len(sequences), self.num_tokens, np.int64)
            starts[: len(inner)] = self._pointers[inner] // self.dtype.itemsize
            yield starts[:-1], np.diff(starts)

    def documents_in(self, start: int, stop: int) -> list[int]:
        """Positions in (start, stop) at which documents begin, ascending: two binary searches in the pointers."""
        documents = range(self.num_documents)
        first = bisect_right(documents, start, key=self.document_start)
        last = bisect_left(documents, stop, lo=first, key=self.document_start)
        starts = [self.document_start(document) for document in range(first, last)]
        return list(dict.fromkeys(starts))  # a document without tokens begins where the next one does

    def ends(self, size: int) -> Iterator[bytes]:
        """The first and the last `size` bytes of the index, and those of the tokens."""
        for content in (self._index, self._tokens.view(np.uint8)):
            yield content[:size].tobytes()
            yield content[-size:].tobytes()


def _require_content(path: Path) -> None:
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; a data path is the prefix of a .bin/.idx pair ('corpus/wiki' for "
            "corpus/wiki.bin and corpus/wiki.idx): correct the path, or tokenize the source"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: no document was written, or writing was cut off; tokenize the source again")


def _read_header(path: Path, index: npt.NDArray[np.uint8]) -> tuple[np.dtype, int, int]:
    """(dtype, sequences, length of the document index) of an index whose size agrees with its header."""
    header, size = index[: HEADER.size].tobytes(), len(index)
    if header[: len(MAGIC)] != MAGIC[: len(header)]:
        raise ValueError(
            f"{path} is not a Megatron index: it begins with {header[:9]!r} instead of {MAGIC!r}; tokenize "
            "the source into Megatron's mmap .bin/.idx format"
        )
    if len(header) < HEADER.size:
        raise ValueError(
            f"{path} is truncated: {size} bytes, the header alone has {HEADER.size}; copy or tokenize it again"
        )
    _, version, code, sequences, entries = HEADER.unpack(header)
    if version != VERSION:
        raise ValueError(
            f"{path} has format version {version}; only version {VERSION} can be read: tokenize the source again"
        )
    if code not in DTYPES:
        raise ValueError(
            f"{path} has dtype code {code}, which is not an integer type of token ids (known: "
            f"{sorted(DTYPES)}); the file holds something else than tokens or is damaged"
        )
    expected = HEADER.size + 12 * sequences + 8 * entries
    if size != expected:
        what = "truncated" if size < expected else "longer than its header says (multimodal indices are not supported)"
        raise ValueError(
            f"{path} is {what}: {size} bytes, but {sequences} sequences and {entries - 1} documents need "
            f"{expected}; copy or tokenize it again"
        )
    if sequences < 1 or entries < 2:
        raise ValueError(f"{path} holds {sequences} sequences in {entries - 1} documents: nothing to train on")
    return DTYPES[code], sequences, entries


class IndexedWriter:
    """Writes a `.bin/.idx` pair document by document; one document is one sequence.

    Use it as a context manager. Nothing exists under the final names before `close`; an exception in the
    block leaves none.

    Args:
        prefix: path without `.bin`/`.idx`; its folder is made if missing.
        dtype: of the token ids, normally `best_dtype(vocab_size)`.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in DTYPES.values():
            raise ValueError(
                f"dtype={np.dtype(dtype)} cannot hold token ids in a .bin file; use best_dtype(vocab_size)"
            )
        self.num_tokens = 0
        self._lengths = array("i")
        final = bin_path(prefix)
        final.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = [_temporary(final), _temporary(idx_path(prefix))]
        self._file: BinaryIO | None = self._temporary[0].open("wb")

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return len(self._lengths)

    def add_document(self, tokens: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """Append one document. Its last token should be the end-of-document id (Megatron's `--append-eod`).

        Raises:
            ValueError: no tokens, or an id that the dtype cannot hold.
        """
        assert self._file is not None, "add_document after close"
        values = np.asarray(tokens)
        if values.ndim != 1 or not values.size or values.dtype.kind not in "iu":
            raise ValueError(
                f"{self.prefix}: document {self.num_documents} has shape {values.shape} and dtype "
                f"{values.dtype}; a document is a list of at least one token id"
            )
        low, high, limits = int(values.min()), int(values.max()), np.iinfo(self.dtype)
        if low < max(limits.min, 0) or high > limits.max:
            raise ValueError(
                f"{self.prefix}: document {self.num_documents} has token ids {low} to {high}, {self.dtype} "
                f"holds 0 to {limits.max}; use best_dtype(vocab_size)"
            )
        self._file.write(values.astype(self.dtype).tobytes())
        self._lengths.append(len(values))
        self.num_tokens += len(values)

    def close(self) -> None:
        """Write the index, flush both files to the disk and give them their names; the index comes last."""
        if self._file is None:
            return
        temporary_bin, temporary_idx = self._temporary
        if not self._lengths:
            self.abort()
            raise ValueError(f"{self.prefix}: no document was added, so there is nothing to write")
        _flush_to_disk(self._file)
        self._file.close()
        self._file = None
        with temporary_idx.open("wb") as file:
            self._write_index(file)
            _flush_to_disk(file)
        # An old index beside a new .bin would describe the wrong tokens: it goes first.
        idx_path(self.prefix).unlink(missing_ok=True)
        temporary_bin.replace(bin_path(self.prefix))
        temporary_idx.replace(idx_path(self.prefix))

    def _write_index(self, file: BinaryIO) -> None:
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        lengths = np.frombuffer(self._lengths, dtype=np.intc)
        file.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4").tobytes())
        start = 0
        for begin in range(0, len(lengths), POINTER_CHUNK):
            ends = start + np.cumsum(lengths[begin : begin + POINTER_CHUNK], dtype=np.int64) * self.dtype.itemsize
            file.write(np.concatenate([[start], ends[:-1]]).astype("<i8").tobytes())
            start = int(ends[-1])
        for begin in range(0, len(lengths) + 1, POINTER_CHUNK):
            file.write(np.arange(begin, min(begin + POINTER_CHUNK, len(lengths) + 1), dtype="<i8").tobytes())

    def abort(self) -> None:
        """Delete what was written; files of the same name from before stay as they were."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for path in self._temporary:
            path.unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def _flush_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
