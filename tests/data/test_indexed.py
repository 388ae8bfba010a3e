"""The token files, held against a parser written from the format's description with `struct` alone."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lite.data.indexed import IndexedDataset, IndexedWriter, best_dtype

CODES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}
documents_of_tokens = st.lists(st.lists(st.integers(0, 65_535), min_size=1, max_size=9), min_size=1, max_size=9)


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16") -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def parse(prefix: Path) -> tuple[list[list[int]], list[int]]:
    """(sequences, document index) of a pair of files, read without numpy and without our package."""
    index, tokens = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, entries = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    pointers = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    document_index = struct.unpack_from(f"<{entries}q", index, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * entries
    found = [struct.unpack_from(f"<{n}{CODES[code]}", tokens, at) for at, n in zip(pointers, lengths)]
    assert len(tokens) == sum(lengths) * struct.calcsize(CODES[code])
    return [list(sequence) for sequence in found], list(document_index)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(documents=documents_of_tokens, dtype=st.sampled_from(["uint16", "int32", "int64"]))
def test_another_parser_reads_what_was_written(tmp_path: Path, documents: list[list[int]], dtype: str) -> None:
    prefix = write(tmp_path / "x", documents, dtype)
    assert parse(prefix) == (documents, list(range(len(documents) + 1)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(documents=documents_of_tokens, data=st.data())
def test_stream_and_document_starts(tmp_path: Path, documents: list[list[int]], data: st.DataObject) -> None:
    dataset = IndexedDataset(write(tmp_path / "x", documents))
    stream = [token for document in documents for token in document]
    begins = [sum(map(len, documents[:d])) for d in range(len(documents))]
    assert (dataset.num_tokens, dataset.num_documents) == (len(stream), len(documents))
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert dataset.tokens(start, stop).tolist() == stream[start:stop]
    assert dataset.documents_in(start, stop) == [at for at in begins if start < at < stop]


# What Megatron Core 0.16.1's own IndexedDatasetBuilder writes for [[1, 2, 3], [4, 65535]] in uint16.
MEGATRON_IDX = bytes.fromhex(
    "4d4d4944494458000001000000000000000802000000000000000300000000000000"
    "03000000020000000000000000000000060000000000000000000000000000000100"
    "0000000000000200000000000000"
)
MEGATRON_BIN = bytes.fromhex("0100020003000400ffff")


def test_bytes_are_those_of_megatron_core(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2, 3], [4, 65_535]])
    assert (tmp_path / "x.idx").read_bytes() == MEGATRON_IDX
    assert (tmp_path / "x.bin").read_bytes() == MEGATRON_BIN


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """Megatron may split a document into sentences: only the document index says where documents begin."""
    index = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, 3, 3)
    index += struct.pack("<3i", 2, 3, 1) + struct.pack("<3q", 0, 8, 20) + struct.pack("<3q", 0, 2, 3)
    (tmp_path / "x.idx").write_bytes(index)
    (tmp_path / "x.bin").write_bytes(struct.pack("<6i", *range(6)))
    dataset = IndexedDataset(tmp_path / "x")
    assert (dataset.num_sequences, dataset.num_documents) == (3, 2)
    assert dataset.documents_in(0, 6) == [5]
    assert dataset.tokens(0, 6).tolist() == list(range(6))


def test_reading_makes_no_copy(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "x", [[1, 2, 3]]))
    assert np.shares_memory(dataset.tokens(0, 2), dataset.tokens(1, 3))
    assert not dataset.tokens(0, 3).flags.writeable


def test_many_documents_cross_the_chunk_of_the_pointer_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lite.data.indexed.POINTER_CHUNK", 7)
    documents = [[d] * (1 + d % 3) for d in range(50)]
    assert parse(write(tmp_path / "x", documents)) == (documents, list(range(51)))


@pytest.mark.parametrize(("vocab_size", "name"), [(100, "uint16"), (65_499, "uint16"), (65_500, "int32")])
def test_best_dtype_follows_megatron(vocab_size: int, name: str) -> None:
    assert best_dtype(vocab_size).name == name


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def patch(path: Path, at: int, content: bytes) -> None:
    old = path.read_bytes()
    path.write_bytes(old[:at] + content + old[at + len(content) :])


# Two documents of 3 and 2 uint16 tokens: .idx = 34 header + 2*4 + 2*8 + 3*8 = 82 bytes, .bin = 10 bytes.
DAMAGE = {
    "no index": (lambda idx, bin: idx.unlink(), r"x\.idx does not exist; .*prefix"),
    "no tokens": (lambda idx, bin: bin.unlink(), r"x\.bin does not exist"),
    "empty index": (lambda idx, bin: cut(idx, 0), r"x\.idx is empty"),
    "empty tokens": (lambda idx, bin: cut(bin, 0), r"x\.bin is empty"),
    "cut in the magic": (lambda idx, bin: cut(idx, 5), r"x\.idx is truncated: 5 bytes"),
    "cut in the header": (lambda idx, bin: cut(idx, 20), r"x\.idx is truncated: 20 bytes"),
    "cut behind the header": (lambda idx, bin: cut(idx, 60), r"x\.idx is truncated: 60 bytes, .*need 82"),
    "longer": (lambda idx, bin: idx.write_bytes(idx.read_bytes() + b"\0\0"), r"longer than its header says"),
    "magic": (lambda idx, bin: patch(idx, 0, b"TNTIDX\0\0\0"), r"not a Megatron index: it begins with b'TNT"),
    "version": (lambda idx, bin: patch(idx, 9, b"\x02"), r"format version 2"),
    "float tokens": (lambda idx, bin: patch(idx, 17, b"\x07"), r"dtype code 7"),
    "unknown dtype": (lambda idx, bin: patch(idx, 17, b"\x63"), r"dtype code 99"),
    "other dtype": (lambda idx, bin: patch(idx, 17, b"\x04"), r"x\.bin: 10 bytes, .*bytes 0 to 14"),
    "truncated tokens": (lambda idx, bin: cut(bin, 8), r"x\.bin: 8 bytes, but the index .* 0 to 10; .*truncated"),
    "longer tokens": (lambda idx, bin: bin.write_bytes(bytes(12)), r"x\.bin: 12 bytes, but the index"),
    "document index": (lambda idx, bin: patch(idx, 74, b"\x07"), r"document index runs from 0 to 7, .* 2 seq"),
    "first pointer": (lambda idx, bin: patch(idx, 42, b"\x02"), r"describes bytes 2 to 10"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "x", [[1, 2, 3], [4, 5]])
    act, message = DAMAGE[damage]
    act(tmp_path / "x.idx", tmp_path / "x.bin")
    with pytest.raises(ValueError, match=message):
        IndexedDataset(tmp_path / "x")


def test_an_index_of_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.idx").write_bytes(struct.pack("<9sQBQQq", b"MMIDIDX\x00\x00", 1, 8, 0, 1, 0))
    (tmp_path / "x.bin").write_bytes(b"\0\0")
    with pytest.raises(ValueError, match="0 sequences in 0 documents"):
        IndexedDataset(tmp_path / "x")


def test_reading_outside_is_refused(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "x", [[1, 2, 3]]))
    with pytest.raises(ValueError, match=r"\[2, 4\) .*outside of \[0, 3\)"):
        dataset.tokens(2, 4)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "at least one token id"),
        ([1.5], "float64"),
        ([[1]], r"shape \(1, 1\)"),
        ([65_536], "65536, uint16 holds 0 to 65535"),
        ([-1], "-1 to -1, uint16 holds 0"),
    ],
)
def test_bad_documents_are_refused_and_nothing_is_left(tmp_path: Path, document: list, message: str) -> None:
    def spoil() -> None:
        with IndexedWriter(tmp_path / "x", "uint16") as writer:
            writer.add_document([1])
            writer.add_document(document)

    with pytest.raises(ValueError, match=message):
        spoil()
    assert list(tmp_path.iterdir()) == []


def test_nothing_stands_under_the_final_names_before_close(tmp_path: Path) -> None:
    write(tmp_path / "x", [[7]])
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    writer = IndexedWriter(tmp_path / "x", "uint16")
    writer.add_document([1, 2])
    assert {name: (tmp_path / name).read_bytes() for name in old} == old
    writer.abort()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
    write(tmp_path / "x", [[1, 2]])
    assert parse(tmp_path / "x")[0] == [[1, 2]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_dying_between_the_two_renames_leaves_no_pair_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old index describes as many bytes as the new tokens have; it must not be found beside them."""
    write(tmp_path / "x", [[1, 2], [3]])
    real = Path.replace

    def die(path: Path, target: Path) -> Path:
        if str(target).endswith(".idx"):
            raise OSError("killed")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(OSError, match="killed"):
        write(tmp_path / "x", [[4], [5, 6]])
    with pytest.raises(ValueError, match=r"x\.idx does not exist"):
        IndexedDataset(tmp_path / "x")


def test_writing_nothing_and_wrong_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no document was added"), IndexedWriter(tmp_path / "x", "uint16"):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="float32 cannot hold token ids"):
        IndexedWriter(tmp_path / "x", "float32")
