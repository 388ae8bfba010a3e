"""A small real corpus that needs no download: text that the installed packages ship.

    <folder>/documents/<group>.<source>.jsonl   text, source, origin, language, license, sha256, split
    <folder>/tokenizer/                         Hugging Face form, see data/tokenizer.py
    <folder>/tokens/<source>.{bin,idx,json}     training documents, shuffled, each ended by the end token
    <folder>/tokens/<source>.validation.{...}   held-out documents
    <folder>/corpus.json                        versions, counts, licenses, file sizes; marks a whole corpus

Notable features:
- a pure function of the packages' versions: sorted walks, hashes instead of random numbers, no times
- exact duplicates are dropped over all sources, then documents are held out by the hash of their own text
- built in a hidden folder beside the final one and renamed when it is on the disk, so it is whole or not
  there; a lock makes several processes that start at once build it once
- a finished corpus is kept, whatever versions built it; delete its folder to build it again
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_lite.atomic import fsync
from megatron_lite.data.indexed import IndexedWriter, best_dtype
from megatron_lite.data.sample.documents import Part, collect
from megatron_lite.data.sample.readers import versions
from megatron_lite.data.sidecar import Sidecar, write_sidecar
from megatron_lite.data.tokenizer import (
    encode_documents,
    fingerprint,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from megatron_lite.file_lock import FileLock

FORMAT = 1
# Bytes of training text that a group gives to train the tokenizer on. The multilingual part is all taken,
# twice: Nemotron-4 up-samples non-English text there as well.
_TOKENIZER_BYTES = {"english": 2_500_000, "multilingual": 50_000_000, "code": 2_000_000}
_PARTS = {"documents", "tokenizer", "tokens", "corpus.json"}  # all that a build writes
_TOKENIZER_REPEATS = {"english": 1, "multilingual": 2, "code": 1}

Report = Callable[[str], None]


@dataclass(frozen=True)
class SampleSource:
    """A tokenized source. train, validation: prefixes of `.bin/.idx` pairs. Counts are by split."""

    group: str
    name: str
    train: Path
    validation: Path
    documents: dict[str, int]
    tokens: dict[str, int]
    languages: list[str]
    licenses: list[str]


def prepare(folder: str | Path, *, vocab_size: int = 8192, scale: float = 1.0, report: Report | None = None) -> Path:
    """The sample corpus in `folder`, built there first if there is none; milliseconds when there is.

    `scale` takes that portion of every source's bytes (1.0 is about 16 MB of text). `report` is told each
    stage in a line. Safe to call from several processes at once and to kill at any time.

    Raises ValueError when a package is missing, the folder holds something else, is damaged or was built with
    another `vocab_size` or `scale`; OSError (with a way out) when it cannot be written.
    """
    folder = Path(folder)
    settings = {"format": FORMAT, "vocab_size": vocab_size, "scale": scale}
    say = report or (lambda line: None)
    target = folder.resolve()
    try:
        if _is_finished(folder, settings):
            return folder
        found = versions()  # a missing package is named before anything is made
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(f".{target.name}.lock")
        with FileLock(
            lock,
            key="data.sample_corpus",
            value=folder,
            waiting=lambda owner: say(f"sample corpus: {owner} is building it; waiting"),
        ):
            if not _is_finished(folder, settings):
                _build(target, {**settings, "versions": found}, say)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the sample corpus cannot be built in {str(folder)!r} ({error}); make the "
            "place writable with about 100 MB free, or name another one with data.sample_corpus=...",
        ) from error
    return folder


def sources(folder: str | Path) -> list[SampleSource]:
    """What a finished corpus holds, in the table's order. Raises ValueError when there is none."""
    folder = Path(folder)
    marker = _marker(folder)
    if marker is None:
        raise ValueError(f"{str(folder)!r} holds no finished sample corpus; run `prepare` on it first")
    return [
        SampleSource(
            name=name,
            train=folder / "tokens" / name,
            validation=folder / "tokens" / f"{name}.validation",
            **{key: entry[key] for key in ("group", "documents", "tokens", "languages", "licenses")},
        )
        for name, entry in marker["sources"].items()
    ]


def _marker(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{folder / 'corpus.json'} is damaged; delete {str(folder)!r} to build it again") from error


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a whole corpus is there. Raises ValueError for a damaged or another one, or other files."""
    marker = _marker(folder)
    if marker is None:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return False
        marker = _marker(folder)  # another process may have finished between the two looks
    if marker is None:
        raise ValueError(
            f"{str(folder)!r} exists but is not a sample corpus (no corpus.json); move it away, or name another "
            "folder with data.sample_corpus=..."
        )
    for key, wanted in settings.items():
        if marker.get(key) != wanted:
            raise ValueError(
                f"the sample corpus in {str(folder)!r} has {key}={marker.get(key)}, asked for is {wanted}; "
                "delete the folder to build it again, or name another one with data.sample_corpus=..."
            )
    for name, size in marker["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(
                f"{path} is missing or does not have its {size} bytes; delete {str(folder)!r} to build it again"
            )
    return True


def _build(target: Path, header: dict[str, Any], say: Report) -> None:
    """Build beside `target` and rename. What an earlier, killed build left there is removed first.

    Raises:
        ValueError: a folder of that name holds something else.
    """
    building = target.with_name(f".{target.name}.building")
    if building.exists():
        foreign = sorted({path.name for path in building.iterdir()} - _PARTS)
        if foreign:
            raise ValueError(f"{building} holds {foreign[0]}, which no build of the sample corpus writes; move it away")
        shutil.rmtree(building)
    building.mkdir()
    try:
        say("sample corpus: reading the installed packages (once, under a minute)")
        parts = collect(header["scale"], say)
        _write_documents(building, parts)
        say(f"sample corpus: training a tokenizer of {header['vocab_size']} tokens")
        train_tokenizer(_tokenizer_text(parts), building / "tokenizer", vocab_size=header["vocab_size"])
        say("sample corpus: tokenizing")
        summary = _tokenize(building, parts)
        files = sorted(path for path in building.rglob("*") if path.is_file())
        sizes = {path.relative_to(building).as_posix(): path.stat().st_size for path in files}
        tokenizer = next(iter(summary.values()))["tokenizer"]
        _write_json(building / "corpus.json", {**header, "tokenizer": tokenizer, "sources": summary, "files": sizes})
        _sync(building)
        building.rename(target)
        fsync(target.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    total = sum(entry["tokens"]["train"] for entry in summary.values())
    say(f"sample corpus: {len(summary)} sources, {total:,} training tokens in {target}")


def _write_documents(building: Path, parts: list[Part]) -> None:
    folder = building / "documents"
    folder.mkdir()
    for part in parts:
        path = folder / f"{part.source.group}.{part.source.name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for digest, document in zip(part.hashes, part.documents):
                row = {
                    **asdict(document),
                    "source": part.source.name,
                    "sha256": digest,
                    "split": "validation" if digest in part.held_out else "train",
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _tokenizer_text(parts: list[Part]) -> Iterator[str]:
    """Training documents (never held-out ones): an equal portion of each source of a group."""
    for group, limit in _TOKENIZER_BYTES.items():
        texts = [[d.text for d in p.split("train")] for p in parts if p.source.group == group]
        portion = min(1.0, limit / sum(len(text.encode()) for source in texts for text in source))
        for source in texts:
            chosen = source[: round(portion * len(source))]
            for _ in range(_TOKENIZER_REPEATS[group]):
                yield from chosen


def _tokenize(building: Path, parts: list[Part]) -> dict[str, dict[str, Any]]:
    """Write `.bin/.idx` and their sidecars for both splits of every source; the summary for `corpus.json`."""
    tokenizer = load_tokenizer(building / "tokenizer")
    identity = fingerprint(tokenizer)
    summary: dict[str, dict[str, Any]] = {}
    for part in parts:
        entry: dict[str, Any] = {
            "group": part.source.group,
            "tokenizer": identity,
            "documents": {},
            "tokens": {},
        }
        for split, suffix in (("train", ""), ("validation", ".validation")):
            documents = part.split(split)
            prefix = building / "tokens" / f"{part.source.name}{suffix}"
            with IndexedWriter(prefix, best_dtype(vocabulary_size(tokenizer))) as writer:
                for ids in encode_documents(tokenizer, (d.text for d in documents)):
                    writer.add_document(ids)
            sidecar = Sidecar(
                tokenizer=identity,
                tokenizer_name="sample",
                eod=tokenizer.eos_token_id,
                vocab_size=vocabulary_size(tokenizer),
                documents=len(documents),
                tokens=writer.num_tokens,
                languages=sorted({d.language for d in documents}),
                licenses=sorted({d.license for d in documents}),
            )
            write_sidecar(prefix, sidecar)
            entry["documents"][split], entry["tokens"][split] = len(documents), writer.num_tokens
        entry["languages"] = sorted({d.language for d in part.documents})
        entry["licenses"] = sorted({d.license for d in part.documents})
        entry["bytes"] = sum(len(d.text.encode()) for d in part.documents)
        summary[part.source.name] = entry
    return summary


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    """Flush all of `folder`: else a power cut after the rename leaves empty files that look whole."""
    for path in [*folder.rglob("*"), folder]:
        fsync(path)
