"""The steps of a recipe in order, their input folders and the names of their output folders.

    read -> normalize (lines, normalize) -> filter -> exact -> near -> decontaminate -> tokenizer -> tokenize

A step's folder is `work/<step>-<fingerprint>`: the fingerprint covers its settings and all steps before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_tools.documents import Corpus
from data_tools.recipe import RecipeConfig
from data_tools.sources import plan_source
from data_tools.stages.decontaminate import DecontaminateStep, require_evaluation
from data_tools.stages.exact_dedup import ExactStep, HashStep
from data_tools.stages.filter import FilterStep
from data_tools.stages.near_dedup import CandidateStep, NearStep, SignatureStep
from data_tools.stages.normalize import CountLinesStep, NormalizeStep
from data_tools.stages.read import ReadStep
from data_tools.stages.tokenize import EncodeStep, MergeStep
from data_tools.stages.tokenizer import SampleStep, TokenizerStep, recipe_groups
from data_tools.steps import Step, fingerprint
from data_tools.take_tokenizer import require_tokenizer

STAGES = ("read", "normalize", "filter", "exact", "near", "decontaminate", "tokenizer", "tokenize")


class Pipeline:
    """The steps of a recipe in order. `stages` maps a stage to its steps; `final` names the steps that the report reads."""

    def __init__(self, recipe: RecipeConfig, output: Path) -> None:
        self.recipe = recipe
        self.output = output
        self.steps: dict[str, Step] = {}
        self.stages: dict[str, list[Step]] = {stage: [] for stage in STAGES}
        self._last = ""
        self._build()

    def _add(self, stage: str, name: str, key: Any, make: Callable[[str, Path], Step]) -> Path:
        """Append the step that `make(name, folder)` returns. `key`: all that its output depends on besides earlier steps."""
        self._last = fingerprint(key, self._last)
        folder = self.output / "work" / f"{name}-{self._last}"
        self.steps[name] = make(name, folder)
        self.stages[stage].append(self.steps[name])
        return folder

    def _build(self) -> None:
        recipe = self.recipe
        pieces = [piece for name, source in recipe.sources.items() for piece in plan_source(name, source, recipe.read)]
        stamps = [[file, _stamp(file)] for piece in pieces if piece.type != "datasets" for file in piece.files]
        sources = {name: asdict(source) for name, source in recipe.sources.items()}
        read = self._add(
            "read",
            "read",
            [asdict(recipe.read), list(sources.items()), stamps],
            lambda name, folder: ReadStep(name, folder, recipe.read, recipe.sources, pieces),
        )
        settings = recipe.normalize
        lines = None
        if settings.enabled:
            lines = self._add("normalize", "lines", asdict(settings), lambda n, f: CountLinesStep(n, f, settings, read))
        key: Any = "" if settings.enabled else asdict(settings)
        normalized = self._add("normalize", "normalize", key, lambda n, f: NormalizeStep(n, f, settings, read, lines))
        corpus = Corpus(normalized)
        if recipe.filter.enabled:
            key = asdict(recipe.filter)
            filtered = self._add("filter", "filter", key, lambda n, f: FilterStep(n, f, recipe.filter, normalized))
            corpus = Corpus(normalized, [filtered])
        corpus = self._deduplicate(corpus)
        for name, path in recipe.decontaminate.files.items():
            require_evaluation(name, Path(path))
        if recipe.decontaminate.files:
            key = [asdict(recipe.decontaminate), [_stamp(file) for file in recipe.decontaminate.files.values()]]
            folder = self._add(
                "decontaminate",
                "decontaminate",
                key,
                lambda n, f: DecontaminateStep(n, f, recipe.decontaminate, corpus),
            )
            corpus = Corpus(normalized, [*corpus.dropped_by, folder])
        self.corpus = corpus
        self._tokenize(corpus)

    def _deduplicate(self, corpus: Corpus) -> Corpus:
        exact, near = self.recipe.exact, self.recipe.near
        if exact.enabled:
            before = corpus
            hashes = self._add("exact", "exact_hash", asdict(exact), lambda n, f: HashStep(n, f, exact, before))
            folder = self._add("exact", "exact", "", lambda n, f: ExactStep(n, f, exact, before, hashes))
            corpus = Corpus(corpus.folder, [*corpus.dropped_by, folder])
        if near.enabled:
            rest = corpus
            signatures = self._add(
                "near", "near_signatures", asdict(near), lambda n, f: SignatureStep(n, f, near, rest)
            )
            pairs = self._add("near", "near_candidates", "", lambda n, f: CandidateStep(n, f, near, rest, signatures))
            folder = self._add("near", "near", "", lambda n, f: NearStep(n, f, near, pairs))
            corpus = Corpus(corpus.folder, [*corpus.dropped_by, folder])
        return corpus

    def _tokenize(self, corpus: Corpus) -> None:
        recipe = self.recipe
        settings, tokens = recipe.tokenizer, recipe.tokenize
        groups = recipe_groups(recipe)
        sample = self._add(
            "tokenizer",
            "tokenizer_sample",
            [asdict(settings), tokens.held_out],
            lambda n, f: SampleStep(n, f, settings, corpus, groups, tokens.held_out),
        )
        if settings.path:
            require_tokenizer(Path(settings.path))
        taken = _stamp(settings.path) if settings.path else ""
        tokenizer = self._add("tokenizer", "tokenizer", taken, lambda n, f: TokenizerStep(n, f, settings, sample))
        encoded = self._add(
            "tokenize",
            "tokenize_encode",
            [asdict(tokens), recipe.seed],
            lambda n, f: EncodeStep(n, f, tokens, corpus, tokenizer, recipe.seed),
        )
        self._add("tokenize", "tokenize_merge", "", lambda n, f: MergeStep(n, f, tokens, encoded, tokenizer))


def _stamp(path: str) -> list[Any]:
    """Size and time of a file, or of every file in a folder."""
    place = Path(path)
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
