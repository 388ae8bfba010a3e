"""Bad input: every kind gives a clear place and reason, and nothing that looks whole."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import tarfile
from pathlib import Path

import pytest
import zstandard

from data_tools.documents import read_shard
from data_tools.files import find_files
from data_tools.readers import BadRow, DamagedFile, Row, read_piece
from data_tools.recipe import Columns, ReadConfig, SourceConfig
from data_tools.sources import Piece, plan_source
from data_tools.stages.read import ReadStep, to_document
from data_tools.steps import Progress
from data_tools.text.json_lines import parse_line

LIMIT = 1000


def rows(path: Path, *, type: str = "jsonl", source: SourceConfig | None = None, **part: int) -> list[Row | BadRow]:
    return list(read_piece(Piece("s", type, (str(path),), **part), source or SourceConfig(path=str(path)), LIMIT))


def read_all(path: Path, source: SourceConfig | None = None, **settings) -> list[Row | BadRow]:
    """Every row of what the plan makes of a file, folder or glob."""
    source = source or SourceConfig(path=str(path))
    pieces = plan_source("s", source, ReadConfig(**settings))
    return [row for piece in pieces for row in read_piece(piece, source, LIMIT)]


def texts(found: list[Row | BadRow]) -> list[str]:
    return [row.columns["text"] for row in found if isinstance(row, Row)]


def lines(count: int) -> bytes:
    return b"".join(json.dumps({"text": f"text {i}", "n": i}).encode() + b"\n" for i in range(count))


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_compression_gives_the_same_rows(tmp_path, suffix: str) -> None:
    data = COMPRESS[suffix](lines(30)) + COMPRESS[suffix](
        lines(50)[len(lines(30)) :]
    )  # two streams, as `cat` makes them
    for name in (f"a.jsonl{suffix}", "with_a_wrong_name.jsonl.gz", "without.jsonl"):
        path = tmp_path / name
        path.write_bytes(data)
        assert texts(read_all(path, shard_bytes=100)) == [f"text {i}" for i in range(50)]
        path.unlink()


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
    pieces = plan_source("s", SourceConfig(path=str(tmp_path)), ReadConfig(shard_bytes=500))
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
    with pytest.raises(ValueError, match="klingon"):
        rows(path, source=SourceConfig(path="", encodings=["utf-8", "klingon"]))


def test_a_line_without_end_costs_no_memory(tmp_path) -> None:
    import tracemalloc

    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(lines(1) + b'{"text": "')
        file.seek(1 << 26, 1)  # a hole: 64 MB of zeros that takes no disk
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
    data = b"".join(json.dumps({"text": str(generator.random())}).encode() + b"\n" for _ in range(3_000))
    for suffix in (".gz", ".zst", ".bz2", ".xz"):
        for kind in ("jsonl", "text"):
            path = tmp_path / f"a.{kind}{suffix}"
            compressed = COMPRESS[suffix](data)
            path.write_bytes(compressed[: int(len(compressed) * cut)])
            with pytest.raises(DamagedFile, match=rf"a\.{kind}\{suffix} is truncated or damaged"):
                list(read_piece(Piece("s", kind, (str(path),)), SourceConfig(), 10_000_000))


def test_text_folders(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("  A text.\n", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes("naïve".encode("utf-16"))
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.bin").write_bytes(b"\x00\x01\x02")
    (tmp_path / "e.txt").write_bytes(b"x" * 5000)
    (tmp_path / "sub" / "f.py").write_text("x = 1\n")
    (tmp_path / ".hidden").write_text("no")
    found = read_all(tmp_path, max_bad_share=0.2)
    assert texts(found) == ["  A text.\n", "naïve", "x = 1\n"]
    assert [row.reason.split(" of ")[0] for row in found if isinstance(row, BadRow)] == [
        "empty file",
        "file",
        "a binary file; leave it out",
    ]
    assert found[-2].columns["suffix"] == "py"


def test_parquet(tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(100)], "n": range(100)}), path, row_group_size=10)
    pieces = plan_source("s", SourceConfig(path=str(path)), ReadConfig(shard_bytes=100))
    assert len(pieces) > 1
    found = [row for piece in pieces for row in read_piece(piece, SourceConfig(path=""), LIMIT)]
    assert texts(found) == [f"text {i}" for i in range(100)]
    assert found[42].place == f"{path}:43"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"a\.parquet is not a whole Parquet file.*on_damaged_file=keep_rows"):
        plan_source("s", SourceConfig(path=str(path)), ReadConfig(shard_bytes=100))


def test_what_datasets_loads(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("text,n\nhello,1\nworld,2\n")
    source = SourceConfig(path="csv", type="datasets", data_files=str(tmp_path / "a.csv"))
    pieces = plan_source("s", source, ReadConfig(shard_bytes=1000))
    assert texts([row for piece in pieces for row in read_piece(piece, source, LIMIT)]) == ["hello", "world"]
    missing = SourceConfig(path=str(tmp_path / "nowhere"), type="datasets")
    with pytest.raises(ValueError, match=r"cannot be opened"):
        list(read_piece(Piece("s", "datasets", (missing.path,)), missing, LIMIT))


def read(tmp_path: Path, source: SourceConfig, **settings) -> tuple[list[str], list[dict]]:
    """The read step over a source: texts of the documents, and the quarantine."""
    config = ReadConfig(max_document_bytes=LIMIT, **settings)
    pieces = plan_source("s", source, config)
    step = ReadStep("read", tmp_path / "read", config, {"s": source}, pieces)
    for rank in range(step.tasks()):
        step.run_task(rank, Progress(None))
    step.finish()
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
        ("5", "no column 'text', only ['other']: see data_recipe.sources.s.columns.text"),
        ("6", "empty text"),
        ("7", "column 'text' holds half a character (surrogate U+D800) at character 0"),
    ]


def test_labels_beside_the_text() -> None:
    """Null, NaN and nested values say nothing; a label or a file's name that cannot be written does not break a shard."""
    source = SourceConfig(path="", language="de", license="MIT", columns=Columns(language="l", license="c", id="i"))
    plain = to_document(Row("a:1", {"text": "t", "l": float("nan"), "c": {"x": 1}, "i": None}), "s", source)
    assert (plain.language, plain.license, plain.id) == ("de", "MIT", "s/a:1")
    odd = to_document(Row("a\udce9:1", {"text": "t", "l": "\ud800", "c": ["MIT", "BSD", None], "i": 7}), "s", source)
    assert (odd.language, odd.license, odd.id) == ("\\ud800", "MIT, BSD", "s/7")
    assert to_document(Row("a\udce9:1", {"text": "t"}), "s", SourceConfig(path="")).id == "s/a\\udce9:1"


def test_a_wrong_mapping_stops(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    for count in (3, 30):
        path.write_bytes(lines(count))
        with pytest.raises(
            ValueError, match=r"a\.jsonl:1: no column 'body', only \['n', 'text'\].*data_recipe.sources.s.columns.text"
        ):
            read(tmp_path, SourceConfig(path=str(path), columns=Columns(text="body")))
    assert not (tmp_path / "read" / "DONE.json").exists()


def test_the_first_row_is_a_row_like_the_others(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"about": "this file"}\n' + lines(30))
    documents, quarantine = read(tmp_path, SourceConfig(path=str(tmp_path)))
    assert len(documents) == 30
    assert len(quarantine) == 1


def test_too_many_bad_rows_stop(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(30) + b"{\n" * 10)
    with pytest.raises(ValueError, match=r"10 of 40 rows cannot be used .*first .*a\.jsonl:31: not JSON"):
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
        plan_source("s", SourceConfig(path=str(tmp_path / "nothing")), ReadConfig(shard_bytes=1000))


def test_bad_bytes_and_bad_rows_of_small_files_stop_too(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(100) + b'{"x": "' + b"y" * 5000 + b'"\n')  # one row with most of the bytes
    with pytest.raises(ValueError, match=r"1 of 101 rows cannot be used \(5,009 of .*a\.jsonl:101: line of"):
        read(tmp_path, SourceConfig(path=str(tmp_path)))
    for i in range(10):  # too few rows in a file to judge it alone
        write(tmp_path / "many" / f"{i}.jsonl", lines(5) + b'{"text": 1}\n')
    with pytest.raises(ValueError, match=r"10 of 60 rows cannot be used"):
        read(tmp_path, SourceConfig(path=str(tmp_path / "many")))


def test_a_damaged_file_of_many_does_not_end_the_others(tmp_path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt.gz").write_bytes(gzip.compress(b"text %d" % i)[: 20 if i == 1 else None])
    documents, quarantine = read(tmp_path, SourceConfig(path=str(tmp_path)), on_damaged_file="keep_rows")
    assert documents == ["text 0", "text 2"]
    assert quarantine[0]["place"] == str(tmp_path / "1.txt.gz")


# Which files are data


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two data files in a hidden place that is named, and among them what tools leave behind."""
    root = tmp_path / ".cache" / "data"
    for name in ("a.jsonl", "sub/deep/b.jsonl"):
        write(root / name, lines(2))
    for name in (
        ".git/hooks/x.sample",
        "sub/.cache/c.jsonl",
        "sub/__pycache__/d.jsonl",
        "node_modules/e.jsonl",
        "sub/.f.jsonl",
    ):
        write(root / name, lines(2))
    return root


@pytest.mark.parametrize("pattern", ["", "**", "**/*", "**/*.jsonl", "**/**/*"])
def test_a_folder_and_a_glob_read_the_same(tree, pattern) -> None:
    found = find_files(tree / pattern)
    assert [os.path.relpath(file.resolve(), tree) for file in found] == ["a.jsonl", "sub/deep/b.jsonl"]


def test_patterns(tree) -> None:
    def names(pattern):
        return [str(file.relative_to(tree)) for file in find_files(tree / pattern)]

    assert names("*.jsonl") == ["a.jsonl"]
    assert names("*/*/?.jsonl") == ["sub/deep/b.jsonl"]
    assert names("sub/.cache/*") == ["sub/.cache/c.jsonl"]  # named, so meant
    assert names("s*/.cache/*") == ["sub/.cache/c.jsonl"]
    assert names("**/__pycache__/*") == ["sub/__pycache__/d.jsonl"]
    assert names("nothing/*") == names("x*") == names("nothing") == []
    assert names("s*") == ["sub"]  # a folder; the plan says that it is not entered
    with pytest.raises(ValueError, match=r"sub is a folder.*/\*\*"):
        plan_source("s", SourceConfig(path=str(tree / "s*")), ReadConfig())


def test_links_are_followed_and_nothing_is_read_twice(tree, tmp_path) -> None:
    blob = write(tmp_path / "elsewhere" / "blobs" / "0123abcd", lines(3))
    (tree / "c.jsonl").symlink_to(blob)  # as the hub's cache does
    (tree / "d.jsonl").symlink_to(tree / "a.jsonl")
    (tree / "loop").symlink_to(tree)
    (tree / "another").symlink_to(tmp_path / "elsewhere")  # the same file without a suffix
    for path in (tree, tree / "**", tree / "**" / "*"):
        assert [str(file.relative_to(tree)) for file in find_files(path)] == ["a.jsonl", "c.jsonl", "sub/deep/b.jsonl"]
    assert len(texts(read_all(tree))) == 7
    (tree / "gone.jsonl").symlink_to(tmp_path / "not_fetched")
    with pytest.raises(ValueError, match=r"gone\.jsonl is a link to .*not_fetched"):
        read_all(tree)
    found = read_all(tree, on_damaged_file="keep_rows")
    assert len(texts(found)) == 7
    assert "not_fetched" in found[-1].reason


def tar() -> bytes:
    with io.BytesIO() as out:
        with tarfile.open(fileobj=out, mode="w:gz") as archive:
            archive.addfile(tarfile.TarInfo("a.jsonl"))
        return out.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345678\n"
OTHERS = {
    "b.csv": (b"text,n\nhello,1\n", "type=datasets, path=csv"),
    "b.tsv.gz": (gzip.compress(b"text\tn\nhello\t1\n"), "type=datasets, path=csv"),
    "b.json": (b'[\n{"text": "x"}]', "JSON array.*path=json"),
    "b.jsonl.xz": (lzma.compress(b'[{"text": "x"}]'), "JSON array.*path=json"),
    "c.json": (b'\xef\xbb\xbf{\n  "text": "x"\n}\n', "one JSON object over several lines"),
    "b.txt": (POINTER, "git lfs pull"),
    "b.parquet": (POINTER, "git lfs pull"),
    "c.jsonl": (b"/annex/objects/SHA256E-s1--2\n", "git annex get"),
    "b.jsonl.gz": (tar(), "an archive"),
    "part-00000": (lines(3), "JSON lines.*type=jsonl"),
    "part-00001": (gzip.compress(lines(3)), "JSON lines.*type=jsonl"),
    "b": (b"PAR1....PAR1", "a Parquet file.*type=parquet"),
    "b.py": (b"\x7fELF\0\0\0", "a binary file"),
    "b.arrow": (b"ARROW1\0\0", "type=datasets, path=arrow"),
    "b.jsonl.lz4": (b"\x04\x22\x4d\x18\0", "unpack"),
    "d.jsonl": (b"\x89PNG\r\n\x1a\n\0\0", "a binary file"),
    "b.jsonl.incomplete": (lines(1), "did not finish"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_read_is_named_and_judged(tmp_path, name) -> None:
    data, reason = OTHERS[name]
    write(tmp_path / name, data)
    write(tmp_path / "a.jsonl", lines(40))
    with pytest.raises(ValueError, match=rf"(?s)1 of 2 files .*{name} is .*{reason}.*max_bad_share"):
        read_all(tmp_path)
    found = read_all(tmp_path, max_bad_share=1)
    assert len(texts(found)) == 40
    assert (found[-1].place, len(found)) == (str(tmp_path / name), 41)


def test_a_small_file_of_another_form_is_told_and_a_large_one_stops(tmp_path) -> None:
    for i in range(20):
        write(tmp_path / f"{i:02}.jsonl", lines(20))
    write(tmp_path / "b.csv", b"text\nhello\n")
    found = read_all(tmp_path)
    assert len(texts(found)) == 400
    assert "a table of delimited values" in found[-1].reason
    write(tmp_path / "b.csv", b"text\n" + b"hello\n" * 5000)
    with pytest.raises(ValueError, match=r"1 of 21 files \(30,005 of"):
        read_all(tmp_path)


def test_a_type_that_is_set_is_believed(tmp_path) -> None:
    write(tmp_path / "b.csv", b"text,n\n")
    write(tmp_path / "part-0", lines(2))
    assert len(texts(read_all(tmp_path, SourceConfig(path=str(tmp_path), type="text")))) == 2
    assert len(texts(read_all(tmp_path, SourceConfig(path=str(tmp_path / "part-*"), type="jsonl")))) == 2


def test_documentation_beside_data_is_not_a_document(tmp_path) -> None:
    for name in ("README.md", "LICENSE", "dataset_infos.json"):
        write(tmp_path / name, b"{\n")
    write(tmp_path / "more.txt", b"text")
    write(tmp_path / "data" / "a.jsonl", lines(2))
    found = read_all(tmp_path)
    assert texts(found) == ["text 0", "text 1", "text"] or texts(found) == ["text", "text 0", "text 1"]
    assert [Path(row.place).name for row in found if isinstance(row, BadRow)] == [
        "LICENSE",
        "README.md",
        "dataset_infos.json",
    ]
    (tmp_path / "data" / "a.jsonl").unlink()
    (tmp_path / "dataset_infos.json").unlink()
    assert len(texts(read_all(tmp_path))) == 3  # a folder of texts


# Columns that nobody asked for


@pytest.mark.parametrize(
    "other",
    [
        b"NaN", b"-Infinity", b'"\\ud800"', b'"caf\xe9"', b'"a\x01b"', b"1" * 6000, b"1e999", b'{"\\udfff": NaN}', b'"\xed\xa0\x80"',
        b"123456789012345678901234567890",
    ],
)  # fmt: skip
@pytest.mark.parametrize("encodings", [["utf-8"], ["utf-8", "cp1252"]])
def test_json_beside_the_text_changes_nothing(other, encodings) -> None:
    line = b'{"x": ' + other + ', "text": "naïve 🙂 \\u00e9", "n": 1}\n'.encode()
    found = parse_line(line, "text", encodings)
    assert found["text"] == "naïve 🙂 é"
    assert found["n"] == 1


def test_a_bad_text_is_told_with_its_column() -> None:
    assert "column 'text' is not valid utf-8 at character 3" in parse_line(b'{"text": "caf\xe9"}', "text", ["utf-8"])
    assert parse_line(b'{"text": "caf\xe9", "u": "\xe9"}', "text", ["utf-8", "cp1252"])["text"] == "café"
    assert "column 'text' holds half" in parse_line(b'{"text": "\\ud83d"}', "text", ["utf-8"])
    assert parse_line(b'{"text": "\\ud83d\\ude00", "x": NaN}', "text", ["utf-8"])["text"] == "😀"
    assert parse_line('{"text": "表示", "x": NaN}'.encode("shift_jis"), "text", ["shift_jis"])["text"] == "表示"


def strings(values: list[bytes], kind=None):
    """A column of strings as other writers make it: unchecked."""
    import pyarrow as pa

    data = pa.array(values, pa.binary())
    return pa.StringArray.from_buffers(len(data), data.buffers()[1], data.buffers()[2])


def test_parquet_beside_the_text_changes_nothing(tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 100
    table = pa.table(
        {
            "url": strings([b"caf\xe9"] * count),
            "when": pa.array([2**62] * count, pa.timestamp("us")),  # beyond Python's years
            "text": [f"text {i}" for i in range(count)],
            "lang": strings([b"e\xe9"] * count),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert texts(read_all(tmp_path)) == [f"text {i}" for i in range(count)]
    source = SourceConfig(path=str(tmp_path), columns=Columns(language="lang"))
    row = read_all(tmp_path, source)[0]
    assert to_document(row, "s", source).language == "e\\xe9"


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_a_bad_text_in_parquet_is_one_row(tmp_path, kind) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = [*(f"téxt {i}".encode() for i in range(600)), b"caf\xe9", b"last"]
    column = strings(values)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pa, kind)())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    found = read_all(tmp_path)
    assert texts(found) == [*(f"téxt {i}" for i in range(600)), "last"]
    assert (found[600].place, found[600].reason) == (f"{tmp_path}/a.parquet:601", "column 'text' is not valid utf-8")
    assert texts(read_all(tmp_path, SourceConfig(path=str(tmp_path), encodings=["utf-8", "cp1252"])))[600] == "café"


def test_a_parquet_file_without_the_column(tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"without a column 'text', it has \['body'\].*sources.s.columns.text"):
        read_all(tmp_path)


def test_a_dataset_reads_only_the_columns_that_are_asked_for(tmp_path) -> None:
    import datasets

    rows = {"text": ["one", "two"], "image": [b"not a picture"] * 2}
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    source = SourceConfig(path=str(tmp_path / "saved"), type="datasets")
    assert texts(read_all(tmp_path, source)) == ["one", "two"]
