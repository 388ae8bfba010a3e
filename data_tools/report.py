"""The report on a corpus: counts by stage, reason and source, examples, tokenizer, datasets, times.

`report.json` and `report.md` are equal for two runs of one recipe; times are in `timing.json`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_tools.documents import read_shard
from data_tools.execution import DONE
from data_tools.pipeline import Pipeline
from data_tools.stages.tokenize import plan_datasets
from data_tools.steps import EXAMPLE_CHARS
from megatron_lite.atomic import read_json

EXAMPLES = 3
DEDUPLICATIONS = ("exact", "near")


def collect(pipeline: Pipeline) -> dict[str, Any]:
    """The whole report on a finished pipeline, as plain values."""
    stages = []
    for name in ("read", "normalize", "filter"):
        if name in pipeline.steps:
            stages.append(sum_tallies(name, pipeline.steps[name].folder))
    before = stages[-1]["documents_out"], stages[-1]["bytes_out"]
    if any(name in pipeline.steps for name in DEDUPLICATIONS):
        for stage in _from_pairs(pipeline, *before):
            stages.append(stage)
    if "decontaminate" in pipeline.steps:
        stages.append(sum_tallies("decontaminate", pipeline.steps["decontaminate"].folder))
    tokenizer = pipeline.steps["tokenizer"].folder
    return {
        "recipe": pipeline.recipe.name,
        "stages": stages,
        "tokenizer": {**read_json(tokenizer / "identity.json"), **read_json(tokenizer / "report.json")},
        "datasets": plan_datasets(pipeline.steps["tokenize_encode"].folder, pipeline.recipe.tokenize.min_documents),
    }


def sum_tallies(name: str, folder: Path) -> dict[str, Any]:
    """The counts of all tasks of a step, added up, with the examples that have the smallest hashes."""
    total: dict[str, Any] = dict.fromkeys(("documents_in", "documents_out", "bytes_in", "bytes_out"), 0)
    kept: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    reasons: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    examples: dict[str, list[dict[str, str]]] = defaultdict(list)
    for path in sorted(folder.glob("*.stats.json")):
        stats = read_json(path)
        for key in total:
            total[key] += stats[key]
        for source, cell in stats["kept"].items():
            _add(kept[source], cell)
        for reason, by_source in stats["reasons"].items():
            for source, cell in by_source.items():
                _add(reasons[reason][source], cell)
        for label, found in stats["examples"].items():
            examples[label] += found
    return {
        "stage": name,
        **total,
        "kept": dict(sorted(kept.items())),
        "reasons": {reason: dict(sorted(by_source.items())) for reason, by_source in sorted(reasons.items())},
        "examples": {label: _smallest(found) for label, found in sorted(examples.items())},
    }


def _add(cell: list[int], more: list[int]) -> None:
    cell[0] += more[0]
    cell[1] += more[1]


def _smallest(examples: list[dict[str, str]]) -> list[dict[str, str]]:
    return sorted(examples, key=lambda example: xxhash.xxh3_64_intdigest(example["id"].encode()))[:EXAMPLES]


def _from_pairs(pipeline: Pipeline, documents: int, size: int) -> Iterator[dict[str, Any]]:
    """Deduplication stores ordinals only: sizes, sources and example texts are read from the shards, once."""
    corpus = pipeline.corpus
    offsets = corpus.offsets()
    pairs = {name: _load_pairs(pipeline.steps[name].folder) for name in DEDUPLICATIONS if name in pipeline.steps}
    chosen = {name: _choose(found) for name, found in pairs.items()}
    wanted = {int(i) for found in chosen.values() for pair in found.tolist() for i in pair}
    dropped = {int(i): name for name, found in pairs.items() for i in found["dropped"]}
    sizes: dict[str, dict[str, list[int]]] = {name: defaultdict(lambda: [0, 0]) for name in pairs}
    texts: dict[int, tuple[str, str]] = {}
    for shard, path in enumerate(corpus.shards()):
        for row, document in read_shard(path):
            ordinal = int(offsets[shard]) + row
            if ordinal in dropped:
                _add(sizes[dropped[ordinal]][document.source], [1, len(document.text.encode())])
            if ordinal in wanted:
                texts[ordinal] = document.id, document.text[:EXAMPLE_CHARS]
    for name, by_source in sizes.items():
        gone = [sum(cell[i] for cell in by_source.values()) for i in (0, 1)]
        examples = [
            {"id": texts[a][0], "text": texts[a][1], "kept_id": texts[b][0], "kept_text": texts[b][1]}
            for a, b in chosen[name].tolist()
        ]
        yield {
            "stage": name,
            "documents_in": documents,
            "documents_out": documents - gone[0],
            "bytes_in": size,
            "bytes_out": size - gone[1],
            "kept": {},
            "reasons": {f"{name} duplicate": dict(sorted(by_source.items()))} if gone[0] else {},
            "examples": {f"{name} duplicate": examples} if examples else {},
        }
        documents, size = documents - gone[0], size - gone[1]


def _load_pairs(folder: Path) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(folder.glob("pairs-*.npy"))])


def _choose(pairs: np.ndarray) -> np.ndarray:
    order = sorted(range(len(pairs)), key=lambda i: xxhash.xxh3_64_intdigest(f"{pairs[i]}".encode()))
    return pairs[order[:EXAMPLES]]


def to_markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"# Corpus {report['recipe']}",
        "",
        "| stage | documents in | out | kept | MB in | MB out |",
        "|---|---|---|---|---|---|",
    ]
    for stage in report["stages"]:
        share = stage["documents_out"] / max(1, stage["documents_in"])
        lines.append(
            f"| {stage['stage']} | {stage['documents_in']:,} | {stage['documents_out']:,} | {share:.1%} "
            f"| {stage['bytes_in'] / 1e6:.1f} | {stage['bytes_out'] / 1e6:.1f} |"
        )
    lines += ["", *_datasets(report), "", *_tokenizer(report["tokenizer"])]
    for stage in report["stages"]:
        lines += ["", *_reasons(stage)]
    return "\n".join(lines) + "\n"


def _datasets(report: dict[str, Any]) -> list[str]:
    lines = [
        "## Datasets",
        "",
        "| dataset | group | documents | tokens | MB | languages | licenses |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, facts in report["datasets"].items():
        lines.append(
            f"| {name} | {facts['group']} | {facts['documents']:,} | {facts['tokens']:,} | {facts['bytes'] / 1e6:.2f} "
            f"| {_top(facts['languages'])} | {_top(facts['licenses'])} |"
        )
    return lines


def _top(counts: dict[str, int], most: int = 4) -> str:
    names = list(counts)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _tokenizer(tokenizer: dict[str, Any]) -> list[str]:
    lines = [
        f"## Tokenizer {tokenizer['name']}, {tokenizer['vocab_size']:,} tokens, fingerprint {tokenizer['fingerprint']}",
        "",
        "`before`: the same without up-sampling." if tokenizer["before"] else "",
        "",
        "| language | bytes/token | before | tokens/word | before |",
        "|---|---|---|---|---|",
    ]
    before = tokenizer["before"] or {}
    for language, now in tokenizer["after"].items():
        old = before.get(language, {})
        lines.append(
            f"| {language} | {now['bytes_per_token']} | {old.get('bytes_per_token', '')} | {now['tokens_per_word']} "
            f"| {old.get('tokens_per_word', '')} |"
        )
    return lines


def _reasons(stage: dict[str, Any]) -> list[str]:
    lines = [f"## {stage['stage']}", ""]
    if stage["reasons"]:
        lines += ["| reason | source | documents | MB |", "|---|---|---|---|"]
    for reason, by_source in stage["reasons"].items():
        lines += [f"| {reason} | {source} | {n:,} | {size / 1e6:.2f} |" for source, (n, size) in by_source.items()]
    for label, examples in stage["examples"].items():
        lines += ["", f"### {stage['stage']}: {label}"]
        for example in examples:
            lines += ["", f"`{example['id']}`", "", *_quoted(example["text"])]
            if "kept_id" in example:
                lines += ["", f"kept: `{example['kept_id']}`", "", *_quoted(example["kept_text"])]
    return lines


def _quoted(text: str) -> list[str]:
    return ["```text", *text.replace("```", "'''").split("\n"), "```"]


def timing(pipeline: Pipeline, cores: int) -> dict[str, Any]:
    """Seconds and share of every step, and MB/s per core. For a step that was killed: the seconds of its last start."""
    seconds = {name: float(read_json(step.folder / DONE)["seconds"]) for name, step in pipeline.steps.items()}
    read = sum_tallies("read", pipeline.steps["read"].folder)
    total = sum(seconds.values())
    steps = {
        name: {"seconds": round(s, 2), "share": round(s / total, 4) if total else 0} for name, s in seconds.items()
    }
    rate = read["bytes_out"] / 1e6 / total / cores if total else 0.0
    return {
        "megabytes": round(read["bytes_out"] / 1e6, 2),
        "seconds": round(total, 2),
        "cores": cores,
        "mb_per_second_and_core": round(rate, 2),
        "steps": steps,
    }
