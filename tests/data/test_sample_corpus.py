"""The sample corpus in miniature: same bytes, held-out documents, one build for many, safe to kill."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.sample import corpus as sample_corpus
from megatron_lite.data.sample import readers as sample_readers
from megatron_lite.data.sample.corpus import prepare, sources
from megatron_lite.data.sample.readers import pieces, read_source
from megatron_lite.data.sample.sources import SOURCES, Source
from tests.distributed import PATIENCE_SECONDS
from tests.forked import PROCESSES

MINIATURE = {"scale": 0.02, "vocab_size": 512}


def build(folder: Path, log: Path, kill_at: str) -> None:
    """In a process of its own, which dies at the first line of the report with `kill_at` in it."""

    def report(line: str) -> None:
        with log.open("a") as file:
            file.write(f"{line}\n")
        if kill_at and kill_at in line:
            os.kill(os.getpid(), signal.SIGKILL)

    prepare(folder, report=report, **MINIATURE)


def start_build(folder: Path, log: Path, *, kill_at: str = "") -> Any:
    process = PROCESSES.Process(target=build, args=(folder, log, kill_at), daemon=True)
    process.start()
    return process


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def documents(folder: Path) -> list[dict[str, str]]:
    files = sorted((folder / "documents").glob("*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("corpus") / "sample", **MINIATURE)


@pytest.mark.slow
def test_three_processes_at_once_give_one_build_with_the_same_bytes(corpus, tmp_path):
    logs = [tmp_path / f"{number}.log" for number in range(3)]
    processes = [start_build(tmp_path / "there" / "sample", log) for log in logs]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    assert sum("reading the installed packages" in log.read_text() for log in logs) == 1
    assert sum("waiting" in log.read_text() for log in logs) == 2
    assert digests(tmp_path / "there" / "sample") == digests(corpus)
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"sample", ".sample.lock"}


@pytest.mark.slow
def test_killed_anywhere_it_leaves_nothing_that_looks_whole(corpus, tmp_path):
    there, log = tmp_path / "there", tmp_path / "log"
    folder, building = there / "sample", there / ".sample.building"
    killed = start_build(folder, log, kill_at="training a tokenizer")
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert building.exists()
    assert not folder.exists()
    killed = start_build(folder, log)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not list(building.glob("tokens/*.idx")) and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.kill()  # in the middle of the token files
    killed.join()
    assert list(building.glob("tokens/*.idx"))
    assert not folder.exists()
    prepare(folder, **MINIATURE)
    assert digests(folder) == digests(corpus)
    assert {path.name for path in there.iterdir()} == {"sample", ".sample.lock"}


def test_no_document_is_there_twice_or_on_both_sides(corpus):
    rows = documents(corpus)
    assert all(row["sha256"] == hashlib.sha256(row["text"].encode()).hexdigest() for row in rows)
    assert len({row["sha256"] for row in rows}) == len(rows)
    for source in SOURCES:
        splits = {row["split"] for row in rows if row["source"] == source.name}
        assert splits == {"train", "validation"}


def test_token_files_hold_exactly_the_documents_of_their_split(corpus):
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    rows = documents(corpus)
    for source in sources(corpus):
        for split, prefix in (("train", source.train), ("validation", source.validation)):
            dataset = IndexedDataset(prefix)
            found = []
            for document in range(dataset.num_documents):
                ids = dataset.tokens(dataset.document_start(document), dataset.document_start(document + 1))
                assert ids[-1] == tokenizer.eos_token_id
                found.append(tokenizer.decode(ids[:-1].tolist()))
            expected = [r["text"] for r in rows if (r["source"], r["split"]) == (source.name, split)]
            assert sorted(found) == sorted(expected)
            assert source.documents[split] == dataset.num_documents
            assert source.tokens[split] == dataset.num_tokens
            manifest = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
            assert manifest["eod"] == tokenizer.eos_token_id
            assert manifest["vocab_size"] == len(tokenizer) == MINIATURE["vocab_size"]
            assert (manifest["documents"], manifest["tokens"]) == (len(expected), dataset.num_tokens)


def test_documents_are_shuffled_in_the_token_files(corpus):
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    source = next(source for source in sources(corpus) if source.name == "python_docs")
    dataset = IndexedDataset(source.train)
    starts = [dataset.document_start(i) for i in range(dataset.num_documents + 1)]
    found = [tokenizer.decode(dataset.tokens(a, b - 1).tolist()) for a, b in pairwise(starts)]
    rows = [r for r in documents(corpus) if r["source"] == source.name and r["split"] == "train"]
    as_read = [row["text"] for row in rows]
    assert found != as_read
    assert found != sorted(as_read)
    by_hash = [row["text"] for row in sorted(rows, key=lambda row: row["sha256"])]
    assert found != by_hash  # held-out documents are the first by hash; the order must not depend on that


def test_sources_groups_languages_and_licenses(corpus):
    found = sources(corpus)
    assert len(found) >= 10
    assert [source.name for source in found] == [source.name for source in SOURCES]
    assert {source.group for source in found} == {"english", "multilingual", "code"}
    assert all(source.licenses and all(source.licenses) for source in found)


def test_many_languages_in_their_own_scripts():
    found: dict[str, str] = {}
    for source in SOURCES:
        if source.group == "multilingual":
            read = list(read_source(source, 10**9))
            assert {document.language for document in read} == set(source.areas)
            for document in read:
                found[document.language] = found.get(document.language, "") + document.text
    assert len(found) >= 8
    letters = {
        "ru": "я",
        "el": "λ",
        "ka": "ა",
        "ar": "ع",
        "he": "ש",
        "hi": "म",
        "ko": "한",
        "ja": "の",
        "de": "ü",
    }
    for language, letter in letters.items():
        assert letter in found[language]


def test_no_file_serves_two_sources():
    """A docstring that is held out must not come back in a code file; by file names, at full scale."""
    owners: dict[str, str] = {}
    for source in SOURCES:
        if source.kind in ("docstrings", "code"):
            for path, _ in sample_readers._files(source):
                assert owners.setdefault(f"{source.package}:{path}", source.name) == source.name
    assert len(owners) > 1_000


def test_a_finished_corpus_is_kept_whatever_versions_built_it(corpus, monkeypatch):
    before = digests(corpus)
    monkeypatch.setattr(sample_corpus, "versions", lambda: pytest.fail("looked at the packages"))
    lines: list[str] = []
    assert prepare(corpus, report=lines.append, **MINIATURE) == corpus
    assert lines == []
    assert digests(corpus) == before


def test_another_vocabulary_is_refused(corpus):
    with pytest.raises(ValueError, match=r"vocab_size=512, asked for is 8192; delete the folder"):
        prepare(corpus, scale=MINIATURE["scale"])


@pytest.mark.parametrize("name", ["tokens/greek_caucasian.bin", "tokenizer/tokenizer.json", "corpus.json"])
def test_damage_is_named(corpus, tmp_path, name):
    folder = Path(shutil.copytree(corpus, tmp_path / "sample"))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{name} .*delete .* to build it again"):
        prepare(folder, **MINIATURE)


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"not a sample corpus.*data.sample_corpus"):
        prepare(tmp_path, **MINIATURE)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    with pytest.raises(ValueError, match="no finished sample corpus"):
        sources(tmp_path / "missing")


def test_missing_package_names_the_way_out(tmp_path, monkeypatch):
    find = sample_readers.importlib.util.find_spec
    monkeypatch.setattr(
        sample_readers.importlib.util, "find_spec", lambda name: None if name == "django" else find(name)
    )
    with pytest.raises(ValueError, match="pip install django"):
        prepare(tmp_path / "sample", **MINIATURE)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sample_corpus.IndexedWriter, "add_document", full)
    with pytest.raises(OSError, match=r"cannot be built in .*No space left.*data.sample_corpus") as caught:
        prepare(tmp_path / "sample", **MINIATURE)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == [".sample.lock"]


def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")  # a file where a folder is needed: fails for root as well
    with pytest.raises(OSError, match=r"cannot be built in .*sample.*data.sample_corpus"):
        prepare(tmp_path / "file" / "sample", **MINIATURE)


def test_config_names_the_sources_of_the_table():
    path = Path(__file__).parents[2] / "configs" / "data" / "sample.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config["tokenizer"] == "${data.sample_corpus}/tokenizer"
    weights = {group: content["weight"] for group, content in config["groups"].items()}
    assert weights == {"english": 0.70, "multilingual": 0.15, "code": 0.15}
    for group, content in config["groups"].items():
        assert list(content["sources"]) == [source.name for source in SOURCES if source.group == group]
        for name, source in content["sources"].items():
            assert source["path"] == f"${{data.sample_corpus}}/tokens/{name}"
            assert source["validation"] == f"${{data.sample_corpus}}/tokens/{name}.validation"


def test_links_to_the_same_file_count_once(tmp_path, monkeypatch):
    (tmp_path / "area").mkdir()
    (tmp_path / "area" / "a.py").write_text("x = 1  # " + "long enough " * 30)
    (tmp_path / "area" / "b.py").symlink_to(tmp_path / "area" / "a.py")
    (tmp_path / "linked").symlink_to(tmp_path / "area")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.py").write_text("y = 1  # " + "long enough " * 30)
    monkeypatch.setattr(sample_readers, "_root", lambda package: tmp_path)
    found = list(read_source(Source("s", "code", "code", "p", "MIT", 1.0), 10**6))
    assert [document.origin for document in found] == ["p:area/a.py"]


def test_translations_are_read_like_gettext_reads_them():
    catalogue = """
msgid ""
msgstr "Project-Id-Version: header, not text\\n"

#, fuzzy
msgid "A guess of the machine"
msgstr "Eine Vermutung der Maschine"

#, python-format
msgid "Add %(name)s to the list"
msgstr ""
"„%(name)s“ zur \\"Liste\\" "
"hinzufügen"

msgid "%d result was found"
msgid_plural "%d results were found"
msgstr[0] "%d Ergebnis wurde gefunden"
msgstr[1] "%d Ergebnisse wurden gefunden"

msgid "Not translated at all"
msgstr "Not translated at all"

#~ msgid "No longer in use"
#~ msgstr "Nicht mehr in Gebrauch"
"""
    assert list(sample_readers._translations(catalogue)) == [
        '„%(name)s“ zur "Liste" hinzufügen',
        "%d Ergebnis wurde gefunden",
        "%d Ergebnisse wurden gefunden",
    ]


def test_long_texts_are_cut_at_blank_lines_and_lose_nothing():
    blocks = [f"block {i}\n" * 50 for i in range(100)]
    text = "\n".join(blocks)
    parts = list(pieces(text))
    assert len(parts) > 1
    assert max(map(len, parts)) <= 8_000
    assert all(part.startswith("block") for part in parts)
    assert "".join(parts).replace("\n", "") == text.replace("\n", "")
    assert list(pieces("short\n\n\ntext")) == ["short\n\n\ntext"]
