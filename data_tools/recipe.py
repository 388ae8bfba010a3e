"""What a corpus is made of and how: the typed config behind `configs/data_recipe/*.yaml`.

Every stage has its own section, and the name of a stage's work folder holds a hash of that section and of everything before
it: after a change of the filter, work restarts at the filter, and all stages before it are reused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

from data_tools.text.filter_code import CodeFilterConfig
from data_tools.text.filter_prose import ProseFilterConfig
from data_tools.text.normalize import NormalizeConfig

SOURCE_TYPES = ("auto", "jsonl", "parquet", "text", "datasets")
KINDS = ("prose", "code")


@dataclass
class Columns:
    """The columns of a source. An empty name: the value of the source is used for every document."""

    text: str = "text"
    language: str = ""
    license: str = ""
    id: str = ""


@dataclass
class SourceConfig:
    """One source: its path, and what its documents are.

    `path` is a file, a folder, a glob, or (type=datasets) a hub name or builder. `language` is a tag such as "en" or
    "python", or "auto" for identification. `dataset` names the .bin/.idx pair: "{source}", "{group}" and "{language}" are replaced.
    """

    path: str = "???"
    type: str = "auto"
    group: str = "english"
    kind: str = "prose"
    language: str = "auto"
    license: str = "unknown"
    dataset: str = "{source}"
    columns: Columns = field(default_factory=Columns)
    limit: int | None = None
    encodings: list[str] = field(default_factory=lambda: ["utf-8"])
    name: str | None = None  # type=datasets: the configuration
    split: str = "train"  # type=datasets
    data_files: str | None = None  # type=datasets


@dataclass
class ReadConfig:
    """`shard_bytes`: text per shard. A shard is the unit of restart, and a worker holds it in memory a few times over at most."""

    shard_bytes: int = 32_000_000
    max_document_bytes: int = 8_000_000
    max_bad_share: float = 0.1
    on_damaged_file: str = "stop"  # or "keep_rows"


@dataclass
class FilterConfig:
    """`languages` changes single thresholds of `prose` for a language, e.g. `ja: {min_words: 20}`."""

    prose: ProseFilterConfig = field(default_factory=ProseFilterConfig)
    code: CodeFilterConfig = field(default_factory=CodeFilterConfig)
    languages: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: int = 3
    enabled: bool = True


@dataclass
class ExactConfig:
    """Exact duplicates, by a 128-bit hash of the text; prose is compared without letter case and runs of white space."""

    enabled: bool = True


@dataclass
class NearConfig:
    """MinHash-LSH over word n-grams. `bands` x `rows` hashes; pairs whose similarity, estimated from all
    hashes, is below `threshold` are both kept."""

    enabled: bool = True
    ngram: int = 5
    bands: int = 20
    rows: int = 6
    threshold: float = 0.75
    seed: int = 1


@dataclass
class DecontaminateConfig:
    """`files`: name -> JSONL, Parquet or text file of an evaluation. One shared run of `ngram` words drops a document."""

    files: dict[str, str] = field(default_factory=dict)
    column: str = "text"
    ngram: int = 13
    max_hits: int = 0


@dataclass
class TokenizerSection:
    """`path`: an existing tokenizer (Hugging Face folder or tokenizer.json, SentencePiece .model); without it one is trained.

    `upsample` multiplies a group's share of the training text; `sample_bytes` is the size of that text.
    """

    path: str | None = None
    vocab_size: int = 32_000
    sample_bytes: int = 100_000_000
    upsample: dict[str, float] = field(default_factory=lambda: {"multilingual": 2.0})
    compare: bool = True


@dataclass
class TokenizeConfig:
    """`held_out` of every dataset's documents (by hash of the text) go to `<dataset>.validation`; `merge_bytes` bounds memory.

    Datasets of fewer than `min_documents` documents are put together as `<group>_small`.
    """

    held_out: float = 0.01
    min_documents: int = 1
    merge_bytes: int = 256_000_000


@dataclass
class ExecutorConfig:
    """Where tasks run. `workers`: tasks at a time; `arguments` are passed to datatrove's executor (slurm: partition, time...)."""

    kind: str = "local"
    workers: int = 1
    poll_seconds: float = 5.0
    arguments: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        """Raises ValueError naming the key if a value is invalid."""
        if self.workers < 1 and (
            self.workers != -1 or self.kind == "local"
        ):  # -1 is datatrove's word for all tasks at once
            raise ValueError(f"executor.workers={self.workers} must be at least 1")
        if not self.poll_seconds > 0:
            raise ValueError(f"executor.poll_seconds={self.poll_seconds} must be above 0")


@dataclass
class RecipeConfig:
    """Everything that determines the corpus in `output`."""

    name: str = "???"
    folder: str = ""  # for recipes to build paths from: `${data_recipe.folder}/english.jsonl`
    output: str = "data/corpora/${data_recipe.name}"
    seed: int = 0
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    read: ReadConfig = field(default_factory=ReadConfig)
    normalize: NormalizeConfig = field(default_factory=NormalizeConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    exact: ExactConfig = field(default_factory=ExactConfig)
    near: NearConfig = field(default_factory=NearConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)
    tokenize: TokenizeConfig = field(default_factory=TokenizeConfig)

    def validate(self) -> None:
        """Raises ValueError naming the first key with an invalid value."""
        _require_name("name", self.name)
        if not self.sources:
            raise ValueError(f"data_recipe.sources of {self.name} is empty; name at least one source")
        for name, source in self.sources.items():
            _validate_source(name, source)
        near, read = self.near, self.read
        _require("near.threshold", near.threshold, 0.5 <= near.threshold <= 1, "0.5 to 1")
        for key, number, least in (
            ("near.bands", near.bands, 1), ("near.rows", near.rows, 1), ("near.ngram", near.ngram, 1),
            ("decontaminate.ngram", self.decontaminate.ngram, 3), ("read.shard_bytes", read.shard_bytes, 1000),
            ("read.max_document_bytes", read.max_document_bytes, 1),
            ("tokenizer.sample_bytes", self.tokenizer.sample_bytes, 1),
            ("tokenizer.vocab_size", self.tokenizer.vocab_size, 257),  # the bytes and the end of a text
            ("tokenize.merge_bytes", self.tokenize.merge_bytes, 1),
        ):  # fmt: skip
            _require(key, number, number >= least, f"at least {least}")
        _require("read.max_bad_share", read.max_bad_share, 0 <= read.max_bad_share <= 1, "0 to 1")
        modes = ("stop", "keep_rows")
        _require("read.on_damaged_file", read.on_damaged_file, read.on_damaged_file in modes, " or ".join(modes))
        forms = ("NFC", "NFKC", "none")
        _require(
            "normalize.unicode_form",
            self.normalize.unicode_form,
            self.normalize.unicode_form in forms,
            ", ".join(forms),
        )
        masks = self.normalize.mask_pii and not self.normalize.enabled
        _require("normalize.mask_pii", self.normalize.mask_pii, not masks, "it with normalize.enabled=true")
        _require("tokenize.held_out", self.tokenize.held_out, 0 <= self.tokenize.held_out < 0.5, "0 to 0.5")
        known = {item.name for item in fields(ProseFilterConfig)}
        for language, changes in self.filter.languages.items():
            if unknown := set(changes) - known:
                raise ValueError(
                    f"data_recipe.filter.languages.{language} sets {sorted(unknown)}, which are not keys of filter.prose: {sorted(known)}"
                )


def _validate_source(name: str, source: SourceConfig) -> None:
    key = f"sources.{name}"
    _require_name(key, name)
    _require_name(f"{key}.group", source.group)
    _require(f"{key}.type", source.type, source.type in SOURCE_TYPES, " or ".join(SOURCE_TYPES))
    _require(f"{key}.kind", source.kind, source.kind in KINDS, " or ".join(KINDS))
    _require(
        f"{key}.limit", source.limit, source.limit is None or source.limit > 0, "a number of rows above 0, or null"
    )
    try:
        source.dataset.format(source=name, group=source.group, language="en")
    except (KeyError, IndexError, ValueError):
        raise ValueError(
            f"data_recipe.{key}.dataset={source.dataset}: only {{source}}, {{group}} and {{language}} are replaced"
        ) from None


def _require_name(key: str, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
        shown = name if len(name) <= 100 else f"{name[:100]}..."
        raise ValueError(
            f"data_recipe.{key}={shown!r} becomes part of file names; use up to 100 letters, digits, '_' and '-'"
        )


def _require(key: str, value: Any, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"data_recipe.{key}={value} is not allowed; use {allowed}")
