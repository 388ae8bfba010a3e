"""Drops documents that contain part of an evaluation: shared runs of n words (13, as in GPT-3, https://arxiv.org/abs/2005.14165).

An evaluation text shorter than n words is searched for as a whole if it has at least `MIN_WORDS` words: shorter ones match
almost anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.documents import Corpus, drop_path
from data_tools.forms import Unusable, find_form
from data_tools.readers import BadRow, read_piece
from data_tools.recipe import Columns, DecontaminateConfig, SourceConfig
from data_tools.sources import Piece
from data_tools.steps import Progress, Step, Tally
from data_tools.text.hashing import ngram_hashes, word_hashes
from megatron_lite.atomic import write_array

MIN_WORDS = 6
MAX_EVALUATION_TEXT = 8_000_000


class Evaluations:
    """The n-grams of every named evaluation; `hits(text)` says which of them a text contains and how often."""

    def __init__(self, config: DecontaminateConfig) -> None:
        self.config = config
        self._by_length: dict[str, dict[int, np.ndarray]] = {
            name: _grams(name, Path(path), config) for name, path in sorted(config.files.items())
        }

    def hits(self, text: str) -> dict[str, int]:
        """Evaluation -> number of its n-grams in `text`; only those above `max_hits`."""
        words = word_hashes(text)
        cache: dict[int, np.ndarray] = {}
        found = {}
        for name, by_length in self._by_length.items():
            count = 0
            for n, grams in by_length.items():
                if len(words) >= n:
                    if n not in cache:
                        cache[n] = np.unique(ngram_hashes(words, n))
                    count += int(np.isin(cache[n], grams, assume_unique=True).sum())
            if count > self.config.max_hits:
                found[name] = count
        return found


def require_evaluation(name: str, path: Path) -> None:
    """Raises ValueError if there is no file at the path."""
    if not path.is_file():
        raise ValueError(
            f"data_recipe.decontaminate.files.{name}={path} does not exist; correct the path or remove the entry"
        )


def _grams(name: str, path: Path, config: DecontaminateConfig) -> dict[int, np.ndarray]:
    require_evaluation(name, path)
    source = SourceConfig(path=str(path), columns=Columns(text=config.column))
    form = find_form(path, source)
    if isinstance(form, Unusable):
        raise ValueError(f"data_recipe.decontaminate.files.{name}: {path} is {form.reason}")
    column = "text" if form.kind == "text" else config.column
    collected: dict[int, list[np.ndarray]] = {}
    for row in read_piece(Piece(name, form.kind, (str(path),)), source, MAX_EVALUATION_TEXT):
        if isinstance(row, BadRow) or not isinstance(row.columns.get(column), str):
            place = row.place
            raise ValueError(
                f"data_recipe.decontaminate.files.{name}: {place} has no text in column {column!r}; set "
                "data_recipe.decontaminate.column, or repair the file"
            )
        words = word_hashes(row.columns[column])
        n = min(config.ngram, len(words))
        if n >= MIN_WORDS:
            collected.setdefault(n, []).append(ngram_hashes(words, n))
    return {n: np.unique(np.concatenate(parts)) for n, parts in sorted(collected.items())}


@dataclass
class DecontaminateStep(Step):
    """One task per shard; writes the dropped rows and the evaluation that each overlaps with."""

    settings: DecontaminateConfig
    corpus: Corpus

    def tasks(self) -> int:
        """One per shard."""
        return len(self.corpus.shards())

    def run_task(self, rank: int, progress: Progress) -> None:
        """Compare shard `rank` with all evaluations."""
        evaluations = Evaluations(self.settings)
        tally, dropped = Tally(), []
        for row, document in self.corpus.read(rank):
            size = len(document.text.encode())
            hits = evaluations.hits(document.text)
            reason = f"overlap: {max(hits, key=lambda name: (hits[name], name))}" if hits else None
            tally.count(document.source, size, reason)
            if reason:
                tally.example(reason, document.id, document.text)
                dropped.append(row)
            progress.add(size)
        write_array(drop_path(self.folder, rank), np.array(dropped, np.int64))
        tally.save(self.folder, rank)
