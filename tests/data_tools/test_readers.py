"""Bad input: every kind gives a clear place and reason, and nothing that looks whole."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest
import zstandard

from data_tools.documents import read_shard
from data_tools.readers import BadRow, DamagedFile, Row, read_piece
from data_tools.recipe import Columns, ReadConfig, SourceConfig
from data_tools.sources import Piece, plan_source
from data_tools.stages.read import ReadStep, to_document
from data_tools.steps import Progress

LIMIT = 1000


def rows(path: Path, *, type: str = "jsonl", source: SourceConfig | None = None, **part: int) -> list[Row | BadRow]:
    return list(read_piece(Piece("s", type, (str(path),), **part), source or SourceConfig(path=str(path)), LIMIT))


def texts(found: list[Row | BadRow]) -> list[str]:
    return [row.columns["text"] for row in found if isinstance(row, Row)]


def lines(count: int) -> bytes:
    return b"".join(json.dumps({"text": f"text {i}", "n": i}).encode() + b"\n" for i in range(count))


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_every_compression_gives_the_same_rows(tmp_path, suffix: str) -> None:
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(lines(50)))
    assert texts(rows(path)) == [f"text {i}" for i in range(50)]


def test_parts_of_a_file_hold_every_line_once(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(100))
    size = path.stat().st_size
    for cuts in ([size // 3, size // 2], [1, 2, 3], [len(lines(10)), len(lines(10)) + 1]):
        edges = [0, *cuts, size]
        found = [text for a, b in itertools.pairwise(edges) for text in texts(rows(path, start=a, end=b))]
        assert found == [f"text {i}" for i in range(100)]


def test_the_plan_cuts_large_files(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(100))
    pieces = plan_source("s", SourceConfig(path=str(tmp_path)), shard_bytes=500)
    assert len(pieces) > 3
    found = [text for piece in pieces for text in texts(list(read_piece(piece, SourceConfig(path=""), LIMIT)))]
    assert found == [f"text {i}" for i in range(100)]


def test_bad_lines_are_told_with_their_place(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    long = b'{"text": "' + b"x" * 5000 + b'"}\n'
    path.write_bytes(lines(1) + b'{"text": "caf\xe9"}\n' + b"{broken\n" + long + b"[1]\n\n" + lines(1))
    found = rows(path)
    assert [type(row) for row in found] == [Row, BadRow, BadRow, BadRow, BadRow, Row]
    assert [row.place.rsplit(":", 1)[1] for row in found] == ["1", "2", "3", "4", "5", "7"]
    reasons = [row.reason for row in found if isinstance(row, BadRow)]
    for reason, words in zip(reasons, ("not valid utf-8", "not JSON", "line of 5013 bytes", "a JSON list")):
        assert words in reason
    assert found[1].head == '{"text": "caf\\xe9"}'


def test_other_encodings_on_request(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "café"}\n'.encode() + '{"text": "café"}\n'.encode("cp1252"))
    assert texts(rows(path, source=SourceConfig(path="", encodings=["utf-8", "cp1252"]))) == ["café", "café"]
    with pytest.raises(ValueError, match="no encoding"):
        rows(path, source=SourceConfig(path="", encodings=["utf-8", "klingon"]))


def test_a_gigabyte_line_costs_no_memory(tmp_path) -> None:
    import tracemalloc

    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(lines(1) + b'{"text": "')
        file.seek(1 << 30, 1)  # a hole: a gigabyte of zeros that takes no disk
        file.write(b'"}\n' + lines(1))
    tracemalloc.start()
    found = rows(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [type(row) for row in found] == [Row, BadRow, Row]
    assert peak < 20_000_000


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_truncated_compressed_files(tmp_path, cut: float) -> None:
    import random

    generator = random.Random(0)
    data = b"".join(json.dumps({"text": str(generator.random())}).encode() + b"\n" for _ in range(20_000))
    for suffix, compressed in (("gz", gzip.compress(data)), ("zst", zstandard.ZstdCompressor().compress(data))):
        path = tmp_path / f"a.jsonl.{suffix}"
        path.write_bytes(compressed[: int(len(compressed) * cut)])
        found = []
        with pytest.raises(
            DamagedFile, match=rf"a\.jsonl\.{suffix} is truncated.*after line \d+|a\.jsonl.*ends after line \d+"
        ):
            found += rows(path)


def test_text_folders(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("  A text.\n", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes("naïve".encode("utf-16"))
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.bin").write_bytes(b"\x00\x01\x02")
    (tmp_path / "e.txt").write_bytes(b"x" * 5000)
    (tmp_path / "sub" / "f.py").write_text("x = 1\n")
    (tmp_path / ".hidden").write_text("no")
    source = SourceConfig(path=str(tmp_path))
    found = [row for piece in plan_source("s", source, 1000) for row in read_piece(piece, source, LIMIT)]
    assert texts(found) == ["  A text.\n", "naïve", "x = 1\n"]
    assert [row.reason.split(" of ")[0] for row in found if isinstance(row, BadRow)] == [
        "empty file",
        "binary file",
        "file",
    ]
    assert found[-1].columns["suffix"] == "py"


def test_parquet(tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(100)], "n": range(100)}), path, row_group_size=10)
    pieces = plan_source("s", SourceConfig(path=str(path)), shard_bytes=100)
    assert len(pieces) > 1
    found = [row for piece in pieces for row in read_piece(piece, SourceConfig(path=""), LIMIT)]
    assert texts(found) == [f"text {i}" for i in range(100)]
    assert found[42].place == f"{path}:43"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="no whole Parquet file"):
        plan_source("s", SourceConfig(path=str(path)), shard_bytes=100)


def test_what_datasets_loads(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("text,n\nhello,1\nworld,2\n")
    source = SourceConfig(path="csv", type="datasets", data_files=str(tmp_path / "a.csv"))
    pieces = plan_source("s", source, 1000)
    assert texts([row for piece in pieces for row in read_piece(piece, source, LIMIT)]) == ["hello", "world"]
    missing = SourceConfig(path=str(tmp_path / "nowhere"), type="datasets")
    with pytest.raises(ValueError, match=r"cannot be opened"):
        list(read_piece(Piece("s", "datasets", (missing.path,)), missing, LIMIT))


def read(tmp_path: Path, source: SourceConfig, **settings) -> tuple[list[str], list[dict]]:
    """The read step over a source: texts of the documents, and the quarantine."""
    config = ReadConfig(max_document_bytes=LIMIT, **settings)
    pieces = plan_source("s", source, config.shard_bytes)
    step = ReadStep("read", tmp_path / "read", config, {"s": source}, pieces)
    for rank in range(step.tasks()):
        step.run_task(rank, Progress(None))
    documents = [d.text for path in sorted(step.folder.glob("*.zst")) for _, d in read_shard(path)]
    quarantine = [json.loads(x) for path in sorted(step.folder.glob("*.quarantine.jsonl")) for x in path.open()]
    return documents, quarantine


def test_quarantine(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(3) + b'{"text": null}\n{"other": 1}\n{"text": "  "}\n{"text": "\\ud800 lone"}\n' + lines(40))
    documents, quarantine = read(tmp_path, SourceConfig(path=str(path)))
    assert len(documents) == 43
    assert [(bad["place"].rsplit(":")[-1], bad["reason"]) for bad in quarantine] == [
        ("4", "column 'text' holds a NoneType, not text"),
        ("5", "no column 'text'"),
        ("6", "empty text"),
        ("7", "not JSON: no low surrogate in string: line 1 column 11 (char 10)"),
    ]


def test_lone_surrogates_from_other_libraries_do_not_break_a_shard(tmp_path) -> None:
    document = to_document(Row("a:1", {"text": "\ud800 lone"}), "s", SourceConfig(path=""))
    assert document.text == "? lone"


def test_a_wrong_mapping_stops_at_once(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(30))
    with pytest.raises(
        ValueError, match=r"a\.jsonl:1 has no column 'body', it has \['n', 'text'\]; set data_recipe.sources.s"
    ):
        read(tmp_path, SourceConfig(path=str(path), columns=Columns(text="body")))
    assert not list((tmp_path / "read").glob("*.stats.json"))


def test_too_many_bad_rows_stop(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(30) + b"{\n" * 10)
    with pytest.raises(ValueError, match=r"10 of 40 rows cannot be used, first .*a\.jsonl:31: not JSON"):
        read(tmp_path, SourceConfig(path=str(path)))
    assert len(read(tmp_path, SourceConfig(path=str(path)), max_bad_share=0.3)[0]) == 30


def test_a_damaged_file_stops_or_is_kept_as_far_as_it_goes(tmp_path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(5000))[:-2000])
    with pytest.raises(ValueError, match=r"truncated or damaged after line \d+.*on_damaged_file=keep_rows"):
        read(tmp_path, SourceConfig(path=str(path)))
    assert not list((tmp_path / "read").iterdir())  # no shard, no temporary file
    documents, quarantine = read(tmp_path, SourceConfig(path=str(path)), on_damaged_file="keep_rows")
    assert 0 < len(documents) < 5000
    assert "damaged" in quarantine[-1]["reason"]


def test_limit(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(3000))
    assert read(tmp_path, SourceConfig(path=str(path), limit=7), shard_bytes=1000)[0] == [f"text {i}" for i in range(7)]


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"data_recipe.sources.s.path=.*no file there"):
        plan_source("s", SourceConfig(path=str(tmp_path / "nothing")), 1000)
