"""The tokenizer stage: a sample of the corpus with some groups up-sampled, a tokenizer trained on it or taken, and a report.

Nemotron-4 (https://arxiv.org/abs/2402.16819, section 2) up-samples non-English text when its tokenizer is trained. Here a group's
share of the sample is proportional to its bytes times `upsample`; the hash of its text decides whether a document is sampled, and it is
sampled more than once where the share exceeds the text that there is. Held-out documents are never in the sample.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import xxhash
import zstandard

from data_tools.documents import HASH_RANGE, SHARD_SUFFIX, Corpus, is_held_out
from data_tools.recipe import RecipeConfig, TokenizerSection
from data_tools.steps import Progress, Step
from data_tools.take_tokenizer import FastTokenizer, take_tokenizer
from data_tools.text.hashing import word_count
from megatron_lite.atomic import atomic_path, write_json

MAX_REPEATS = 8
REPORT_BYTES = 200_000  # of each language


@dataclass
class SampleStep(Step):
    """One task per shard: writes the sampled documents as {text, language, held_out, times}."""

    settings: TokenizerSection
    corpus: Corpus
    sources: dict[str, str]  # source -> group
    held_out: float

    def tasks(self) -> int:
        """One per shard."""
        return len(self.corpus.shards())

    def run_task(self, rank: int, progress: Progress) -> None:
        """Sample shard `rank`."""
        rates = self._rates()
        report_bytes: dict[str, int] = defaultdict(int)
        path = self.folder / f"{rank:05d}{SHARD_SUFFIX}"
        compressor = zstandard.ZstdCompressor(level=1)
        with atomic_path(path) as temporary, temporary.open("wb") as raw, compressor.stream_writer(raw) as stream:
            for _, document in self.corpus.read(rank):
                size = len(document.text.encode())
                progress.add(size)
                rate = rates[document.group]
                fraction = xxhash.xxh3_64_intdigest(document.text.encode(), seed=2) / HASH_RANGE
                times = int(rate) + (fraction < rate % 1)
                held_out = is_held_out(document, self.held_out)
                language = document.language if document.kind == "prose" else f"code: {document.language}"
                wanted = report_bytes[language] < REPORT_BYTES and fraction < 0.2
                if times or wanted:
                    report_bytes[language] += size if wanted else 0
                    row = {"text": document.text, "language": language, "report": wanted}
                    row["times"] = 0 if held_out else times
                    row["plain"] = not held_out and fraction < rates["all groups"]
                    stream.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))

    def _rates(self) -> dict[str, float]:
        """How often a byte of each group is sampled, on average."""
        sizes: dict[str, int] = defaultdict(int)
        for source, size in self.corpus.bytes_by_source().items():
            sizes[self.sources[source]] += size
        weighted = {group: size * self.settings.upsample.get(group, 1.0) for group, size in sizes.items()}
        total = sum(weighted.values()) or 1
        budget = min(self.settings.sample_bytes, total)
        rates = {
            group: min(MAX_REPEATS, budget * weighted[group] / total / max(1, size)) for group, size in sizes.items()
        }
        return {**rates, "all groups": min(1.0, self.settings.sample_bytes / max(1, sum(sizes.values())))}


def sampled(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a finished sample step, in recipe order."""
    for path in sorted(folder.glob(f"*{SHARD_SUFFIX}")):
        with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
            pending = b""
            while chunk := stream.read(1 << 20):
                *lines, pending = (pending + chunk).split(b"\n")
                yield from map(orjson.loads, lines)


@dataclass
class TokenizerStep(Step):
    """One task: writes `tokenizer/`, `identity.json` and `report.json` (bytes per token, tokens per word, by language)."""

    settings: TokenizerSection
    sample: Path

    def run_task(self, rank: int, progress: Progress) -> None:
        """Train the tokenizer or take the named one, and measure it."""
        from megatron_lite.data.tokenizer import fingerprint, load_tokenizer, vocabulary_size

        folder = self.folder / "tokenizer"
        building = self.folder / ".tokenizer.building"
        for stale in (folder, building):
            shutil.rmtree(stale, ignore_errors=True)
        building.mkdir(parents=True)
        before = None
        if self.settings.path:
            take_tokenizer(Path(self.settings.path), building)
        else:
            self._train(building, "times", progress)
            if self.settings.compare and any(factor != 1 for factor in self.settings.upsample.values()):
                before = self.folder / "without_upsampling"
                self._train(before, "plain", progress)
        building.rename(folder)
        tokenizer = load_tokenizer(folder)
        name = Path(self.settings.path).name if self.settings.path else f"bpe_{self.settings.vocab_size}"
        identity = {
            "fingerprint": fingerprint(tokenizer),
            "name": name,
            "eod": tokenizer.eos_token_id,
            "vocab_size": vocabulary_size(tokenizer),
        }
        report = {"after": self._measure(folder), "before": self._measure(before) if before else None}
        write_json(self.folder / "report.json", report)
        write_json(self.folder / "identity.json", identity)

    def _train(self, folder: Path, column: str, progress: Progress) -> None:
        from megatron_lite.data.tokenizer import train_tokenizer

        def texts() -> Iterator[str]:
            for row in sampled(self.sample):
                progress.add(len(row["text"]))
                for _ in range(int(row[column])):
                    yield row["text"]

        if not any(int(row[column]) for row in sampled(self.sample)):
            raise ValueError(
                "data_recipe.tokenizer: there is no text to train on; every document is held out for validation (lower "
                "data_recipe.tokenize.held_out) or outside of the sample (raise data_recipe.tokenizer.sample_bytes)"
            )
        try:
            train_tokenizer(texts(), folder, vocab_size=self.settings.vocab_size)
        except ValueError as error:
            raise ValueError(f"data_recipe.tokenizer: {error}") from None

    def _measure(self, folder: Path) -> dict[str, dict[str, float]]:
        """Language -> bytes per token and tokens per word, on the documents marked for it."""

        tokenizer = FastTokenizer(folder)
        totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        for row in sampled(self.sample):
            cell = totals[row["language"]]
            if row["report"] and cell[0] < REPORT_BYTES:
                text = row["text"][:REPORT_BYTES]
                cell[0] += len(text.encode())
                cell[1] += sum(len(ids) for ids in tokenizer.encode([text])) - 1
                cell[2] += word_count(text)
        return {
            language: {"bytes_per_token": round(size / tokens, 3), "tokens_per_word": round(tokens / max(1, words), 3)}
            for language, (size, tokens, words) in sorted(totals.items())
            if tokens
        }


def recipe_groups(recipe: RecipeConfig) -> dict[str, str]:
    """source -> group."""
    return {name: source.group for name, source in recipe.sources.items()}
