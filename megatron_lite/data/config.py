"""What a run reads: groups of sources, their weights, and phases in which the weights change.

    data:
      groups:
        english: {weight: 0.70, sources: {wiki: {path: d/wiki, weight: 2}, books: {path: d/books, weight: 1}}}
        multilingual: {weight: 0.15, alpha: 0.5, sources: {de: {path: d/de}, th: {path: d/th}}}
        code: {weight: 0.15, sources: {python: {path: d/py, validation: d/py_heldout}}}
      phases:
        - {until_fraction: 0.8}                          # the groups' own weights
        - {weights: {english: 0.6, code: 0.3, english/books: 0.1}}

Weights are proportions: they need not sum to 1. Adding a source is these lines and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class SourceConfig:
    """One source of text.

    path: prefix of its `.bin/.idx` pair. validation: prefix of held-out documents of the same kind. min_document_tokens: only
    documents of at least so many tokens are read, of both files; 0 = all. Two sources may read one file with different values.
    weight: its share inside the group; give it to all sources of a group or to none. In a group without
    weights the shares follow tokens^alpha, and `weight: 0` leaves a source out until a phase names it.
    """

    path: str
    validation: str | None = None
    weight: float | None = None
    min_document_tokens: int = 0


@dataclass
class GroupConfig:
    """Sources that share one weight in the blend.

    alpha: the shares inside the group are tokens^alpha (1, the default: by size; 0: equal; between: small
    sources are lifted, the temperature sampling of multilingual training). Excludes weights of the sources.
    """

    weight: float = 1.0
    alpha: float | None = None
    sources: dict[str, SourceConfig] = field(default_factory=dict)


@dataclass
class PhaseConfig:
    """A stretch of training with its own weights. The last phase has no end; every other has exactly one.

    until_samples: first sample that is no longer in the phase. until_fraction: the same as a fraction of the
    whole run. weights: `group` (split inside by the group's own rule) or `group/source` (that source's own
    share, outside of its group's split) -> proportion of the whole blend. What is not named is not read.
    Empty: the groups' own weights.
    """

    until_samples: int | None = None
    until_fraction: float | None = None
    weights: dict[str, float] = field(default_factory=dict)


@dataclass
class ValidationConfig:
    """windows: how many windows of each held-out file are read; always the first ones, in order."""

    windows: int = 32


@dataclass
class DataConfig:
    """The data of a run.

    seq_len: tokens a sample. reset_attention: attention and positions restart at each document.
    mask_eod_loss: predicting the end of a document does not count. folder: for blends to build paths from
    (`${data.folder}/wiki`). tokenizer: folder of the tokenizer that
    the files were written with. eod_id: end-of-document id, where it is not the tokenizer's own. sample_corpus:
    folder of the corpus that is assembled from installed packages at first use, None for any other data. random_corpus:
    folder of random tokens, which are written at first use.
    """

    seq_len: int = 256
    reset_attention: bool = False
    mask_eod_loss: bool = False
    folder: str = ""
    tokenizer: str = ""
    eod_id: int | None = None
    sample_corpus: str | None = None
    random_corpus: str | None = None
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    phases: list[PhaseConfig] = field(default_factory=list)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def sources(self) -> dict[str, SourceConfig]:
        """Every source under its full name, `group/source`, sorted by name."""
        named = {
            f"{group}/{name}": source
            for group, members in self.groups.items()
            for name, source in members.sources.items()
        }
        return dict(sorted(named.items()))

    def validate(self) -> None:
        """Check all that can be known without opening a file.

        Raises:
            ValueError: naming the key, its value and the way out.
        """
        if self.seq_len < 1:
            raise ValueError(f"data.seq_len={self.seq_len} must be at least 1")
        if self.validation.windows < 1:
            raise ValueError(f"data.validation.windows={self.validation.windows} must be at least 1")
        if not self.groups:
            raise ValueError("data.groups is empty; name at least one group with one source, or take data=sample")
        for name, group in self.groups.items():
            _check_group(f"data.groups.{name}", name, group)
        self._check_paths()
        for number, phase in enumerate(self.phases):
            self._check_phase(f"data.phases[{number}]", phase, last=number == len(self.phases) - 1)

    def _check_paths(self) -> None:
        readers: dict[str, dict[tuple[str, int], str]] = {}  # path -> (purpose, min_document_tokens) -> source
        for name, source in self.sources().items():
            group, _, key = name.partition("/")
            for purpose, path in (("path", source.path), ("validation", source.validation)):
                if path is None:
                    continue
                if not path.strip():
                    raise ValueError(
                        f"data.groups.{group}.sources.{key} has an empty path; give the prefix of a .bin/.idx pair "
                        "(validation=null where nothing is held out)"
                    )
                known = readers.setdefault(path, {})
                reads = (purpose, source.min_document_tokens)
                others = [other for mode, other in known.items() if mode == reads or mode[0] != purpose]
                if others:
                    raise ValueError(
                        f"data.groups: {name} and {others[0]} both read {path!r}; a file belongs to one source, for training or "
                        "for validation: give each its own, raise the weight of one, or give one of them another "
                        "min_document_tokens"
                    )
                known[reads] = name

    def _check_phase(self, key: str, phase: PhaseConfig, *, last: bool) -> None:
        samples, fraction = phase.until_samples, phase.until_fraction
        ends = (samples is not None) + (fraction is not None)
        if ends == 2:
            raise ValueError(f"{key} has until_samples={samples} and until_fraction={fraction}; keep one of them")
        if last and ends:
            raise ValueError(f"{key} is the last phase and lasts to the end of training; remove its until_*")
        if not last and not ends:
            raise ValueError(f"{key} has no end, but a phase follows; give until_samples or until_fraction")
        if samples is not None and samples < 1:
            raise ValueError(f"{key}.until_samples={samples} must be at least 1")
        if fraction is not None and not 0 < fraction <= 1:
            raise ValueError(f"{key}.until_fraction={fraction} must be in (0, 1]")
        known = [*self.groups, *self.sources()]
        for name, weight in phase.weights.items():
            if name not in known:
                raise ValueError(f"{key}.weights names {name!r}, which is not among {known}")
            _check_weight(f"{key}.weights.{name}", weight)
        if phase.weights and not any(phase.weights.values()):
            raise ValueError(f"{key}.weights are all 0, so nothing would be read; raise one")


def _check_weight(key: str, weight: float) -> None:
    if not math.isfinite(weight) or weight < 0:
        raise ValueError(f"{key}={weight} must be a finite number >= 0; 0 switches it off")


def _check_group(key: str, name: str, group: GroupConfig) -> None:
    _check_weight(f"{key}.weight", group.weight)
    if "/" in name or any("/" in source for source in group.sources):
        raise ValueError(f"{key}: names of groups and sources must not contain '/' ({name}: {list(group.sources)})")
    if not group.sources:
        raise ValueError(f"{key}.sources is empty; name a source or remove the group")
    for source, config in group.sources.items():
        if config.weight is not None:
            _check_weight(f"{key}.sources.{source}.weight", config.weight)
        if config.min_document_tokens < 0:
            raise ValueError(
                f"{key}.sources.{source}.min_document_tokens={config.min_document_tokens} must be 0 (all documents) or more"
            )
    weights = [source.weight for source in group.sources.values()]
    if group.alpha is not None and not (math.isfinite(group.alpha) and group.alpha >= 0):
        raise ValueError(f"{key}.alpha={group.alpha} must be a finite number >= 0; 1 is by size, 0 is equal")
    if group.alpha is not None and any(weights):
        raise ValueError(f"{key} has alpha={group.alpha} and weights of sources; keep one of the two")
    if any(weights) and None in weights:
        missing = next(source for source, config in group.sources.items() if config.weight is None)
        raise ValueError(f"{key}.sources.{missing} has no weight, but others of the group have; give one to all")
    if group.weight and not any(weight is None or weight for weight in weights):
        raise ValueError(f"{key}: its sources' weights are all 0; raise one, or set {key}.weight=0")
