"""The command: `python -m megatron_lite inspect data=<name>` shows what a run will read, before it runs.

It prints weights and epochs of every source at a token budget, the phases, how long the documents are, where the first samples come
from, and decoded samples with their document boundaries, and draws a picture. `--config-dir <corpus> data=<recipe>` takes the blend
that `prepare` wrote.

It warns if a source would be read more than `max_epochs` times: according to Muennighoff et al. (https://arxiv.org/abs/2305.16264),
up to 4 passes are about as good as new text, and passes beyond about 16 gain nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_lite.commands.command import run_command
from megatron_lite.data.blend import Blend, open_blend
from megatron_lite.data.config import DataConfig
from megatron_lite.data.sidecar import TokenizerIdentity
from megatron_lite.data.source import Source
from megatron_lite.data.tokenizer import fingerprint, load_tokenizer, vocabulary_size

QUANTILES = (0.1, 0.5, 0.9, 0.99, 1.0)
LONG = (8_192, 32_768, 131_072)  # tokens of a document
PICTURE_TITLE = "blend drawn by mlite inspect"


@dataclass
class InspectConfig:
    """`tokens`: the token budget; 0 is one pass over all data. `samples`: how many are decoded; `places`: how many are listed;
    `picture`: an image file, empty for none."""

    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0
    tokens: float = 0
    max_epochs: float = 4.0
    samples: int = 3
    places: int = 16
    characters: int = 400
    picture: str = "blend.png"

    def validate(self) -> None:
        """Raises ValueError naming the key if a value is invalid."""
        for key in ("tokens", "max_epochs", "samples", "places", "characters"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)} must not be negative")
        if self.picture:
            _require_own_picture(Path(self.picture))


def inspect_command(config: InspectConfig) -> int:
    """`mlite inspect`; returns the exit code."""
    inspect(config)
    return 0


def inspect(config: InspectConfig, console: Console | None = None) -> list[str]:
    """Print all of it; returns the warnings.

    Raises:
        ValueError: the data cannot be used, with the way out.
    """
    config.validate()
    console = console or Console(width=None if Console().is_terminal else 160)
    data = config.data
    if not data.tokenizer:
        raise ValueError(
            "data.tokenizer is empty: name the folder of the tokenizer that the token files were written with"
        )
    tokenizer = load_tokenizer(data.tokenizer)
    identity = TokenizerIdentity(
        fingerprint(tokenizer), data.tokenizer, tokenizer.eos_token_id, vocabulary_size(tokenizer)
    )
    blend = open_blend(data, tokenizer=identity, seed=config.seed, total_samples=1)
    available = sum(source.num_tokens for source in blend.sources.values())
    horizon = max(1, int(config.tokens or available) // data.seq_len)
    blend = open_blend(data, tokenizer=identity, seed=config.seed, total_samples=horizon)
    rows = summarize(blend)
    console.print(_table(blend, rows))
    warnings = [
        f"{row['source']} would be read {row['epochs']:.1f} times (max_epochs={config.max_epochs:g}); lower its weight, the token "
        "budget, or add text"
        for row in rows
        if row["epochs"] > config.max_epochs
    ]
    for warning in warnings:
        console.print(f"[yellow]warning:[/] {warning}")
    console.print(_length_table(blend))
    _places(blend, config.places, console)
    for i in range(config.samples):
        _sample(blend, i, tokenizer, config.characters, console)
    if config.picture:
        draw(blend, rows, Path(config.picture))
        console.print(f"picture: {config.picture}", highlight=False)
    return warnings


def summarize(blend: Blend) -> list[dict[str, Any]]:
    """For every source: tokens, share of each phase, share of the whole budget, samples and epochs at the budget."""
    horizon = blend.total_samples
    counts = blend.counts(0, horizon)
    rows = []
    for name, source in blend.sources.items():
        phases = [float(segment.shares.get(name, 0)) for segment in blend.phases.segments]
        rows.append(
            {
                "source": name,
                "tokens": source.num_tokens,
                "documents": source.num_documents,
                "phases": phases,
                "share": counts[name] / horizon,
                "samples": counts[name],
                "epochs": counts[name] / source.num_windows,
            }
        )
    return rows


def _table(blend: Blend, rows: list[dict[str, Any]]) -> Table:
    horizon, length = blend.total_samples, blend.config.seq_len
    table = Table(title=f"{horizon:,} samples of {length} tokens = {horizon * length:,} tokens")
    starts = [segment.start for segment in blend.phases.segments]
    headings = ["source", "documents", "tokens", *(f"from {start:,}" for start in starts), "all", "samples", "epochs"]
    for i, heading in enumerate(headings):
        table.add_column(
            heading,
            justify="right" if i else "left",
            min_width=max(len(row["source"]) for row in rows) if not i else None,
        )
    for row in rows:
        shares = [f"{share:.2%}" for share in [*row["phases"], row["share"]]]
        table.add_row(
            row["source"],
            f"{row['documents']:,}",
            f"{row['tokens']:,}",
            *shares,
            f"{row['samples']:,}",
            f"{row['epochs']:.2f}",
        )
    return table


def document_lengths(source: Source) -> dict[str, list[float]]:
    """Of the documents that a source reads: the tokens at QUANTILES, and the share of all tokens in documents of at least LONG tokens.

    Reads the index of the token file as a whole.
    """
    lengths = np.sort(np.concatenate([length_D for _, length_D in source.documents.document_lengths()]))
    upto = np.concatenate([[0], np.cumsum(lengths)])
    longer = [1 - float(upto[np.searchsorted(lengths, least)] / upto[-1]) for least in LONG]
    return {"quantiles": np.quantile(lengths, QUANTILES, method="nearest").tolist(), "long": longer}


def _length_table(blend: Blend) -> Table:
    names = {0.5: "median", 1.0: "longest"}
    headings = [names.get(quantile, f"{quantile:.0%}") for quantile in QUANTILES]
    table = Table(
        "source", title="tokens of a document by quantile; share of the tokens in documents of at least so many"
    )
    for heading in (*headings, *(f"{least // 1024}k" for least in LONG)):
        table.add_column(heading, justify="right")
    for name, source in blend.sources.items():
        found = document_lengths(source)
        table.add_row(
            name, *(f"{tokens:,}" for tokens in found["quantiles"]), *(f"{share:.2%}" for share in found["long"])
        )
    return table


def _places(blend: Blend, count: int, console: Console) -> None:
    table = Table(title=f"the first {count} samples")
    for heading in ("sample", "source", "epoch", "window"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for i in range(count):
        draw_i = blend.draw(i)
        table.add_row(str(i), draw_i.source, str(draw_i.epoch), f"{draw_i.window:,}")
    if count:
        console.print(table)


def _sample(blend: Blend, i: int, tokenizer: Any, characters: int, console: Console) -> None:
    place = blend.draw(i)
    source = blend.sources[place.source]
    start = place.window * blend.config.seq_len
    stop = start + blend.config.seq_len
    edges = [start, *source.documents.documents_in(start, stop), stop]
    console.rule(f"sample {i}: {place.source}, window {place.window}, {len(edges) - 1} document(s)", style="dim")
    for number, (first, last) in enumerate(itertools.pairwise(edges)):
        text = tokenizer.decode(source.documents.tokens(first, last).astype(int).tolist())
        shown = text if len(text) <= characters else f"{text[: characters // 2]} [...] {text[-characters // 2 :]}"
        console.print(f"--- document {number}, tokens {first - start} to {last - start}", style="bold", highlight=False)
        console.print(shown, markup=False, highlight=False)


def _require_own_picture(path: Path) -> None:
    """Only a picture that `inspect` has drawn is replaced."""
    if path.exists() and not (path.is_file() and PICTURE_TITLE.encode() in path.read_bytes()):
        raise ValueError(
            f"picture={path} exists and was not drawn by mlite inspect; give another name, or picture='' for none"
        )


def draw(blend: Blend, rows: list[dict[str, Any]], path: Path) -> None:
    """Shares over the run (one column a phase) and epochs of every source, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    horizon = blend.total_samples
    starts = [segment.start for segment in blend.phases.segments]
    edges = [*starts, max(horizon, starts[-1] + 1)]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, max(4.0, 0.25 * len(rows) + 2)), width_ratios=(3, 2))
    colors = pyplot.get_cmap("tab20")
    below = [0.0] * len(starts)
    for number, row in enumerate(rows):
        widths = [b - a for a, b in itertools.pairwise(edges)]
        left.bar(
            starts, row["phases"], widths, bottom=below, align="edge", color=colors(number % 20), edgecolor="white"
        )
        below = [a + b for a, b in zip(below, row["phases"])]
    left.set(xlabel="sample", ylabel="share of the blend", xlim=(0, edges[-1]), ylim=(0, 1), title="what a run reads")
    names = [row["source"] for row in rows]
    right.barh(names, [row["epochs"] for row in rows], color=[colors(i % 20) for i in range(len(rows))])
    right.invert_yaxis()
    right.set(xlabel="passes over the source", title="repetition")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Title": PICTURE_TITLE})
    pyplot.close(figure)


def main() -> None:
    """Parse, inspect, exit."""
    run_command(
        "inspect",
        InspectConfig,
        "What a run will read: shares, epochs, the first samples, decoded text.",
        inspect_command,
    )
