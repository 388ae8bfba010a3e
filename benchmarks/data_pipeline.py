"""MB/s a core of every stage of `data_tools`, beside plain datatrove stages, `datasets.map` and `tokenizers.encode_batch`.

    python benchmarks/data_pipeline.py [--files a.jsonl b.jsonl ...] [--megabytes 20] [--vocab 8000]

Without `--files` the text is the standard library's own source and documentation. All run in one process; the unit is megabytes of text
by second of CPU time (of all threads), so a busy machine changes little. "Same work" is as near as the other side has it:

    filter      datatrove: Gopher quality + repetition, C4, FineWeb filters      datasets: our filter in `map`
    near        datatrove: MinHash signatures, 14 x 8                            -
    tokenize    datatrove: MegatronDocumentTokenizer (encode and write)          datasets: `map(batched)` with the HF tokenizer
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import loguru
from rich.console import Console
from rich.table import Table

from data_tools.execution import run_step
from data_tools.pipeline import STAGES, Pipeline
from data_tools.recipe import Columns, ExecutorConfig, RecipeConfig, SourceConfig
from data_tools.take_tokenizer import FastTokenizer
from data_tools.text.filter_prose import ProseFilter, ProseFilterConfig


def default_texts(limit: int) -> list[dict[str, str]]:
    """The standard library's documentation and source, up to `limit` bytes."""
    from pydoc_data.topics import topics

    rows = [{"text": text, "kind": "prose"} for text in topics.values()]
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts:
            rows.append({"text": path.read_text(encoding="utf-8", errors="replace"), "kind": "code"})
    return cut(rows, limit)


def read_texts(files: list[str], limit: int) -> list[dict[str, str]]:
    """An equal part of `limit` bytes from every file; files named *code* are code."""
    rows = []
    for file in files:
        part = []
        size = 0
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["text"]
                size += len(text.encode())
                part.append({"text": text, "kind": "code" if "code" in Path(file).name else "prose"})
                if size > limit / len(files):
                    break
        rows += part
    return rows


def cut(rows: list[dict[str, str]], limit: int) -> list[dict[str, str]]:
    """The first rows of together `limit` bytes."""
    kept, size = [], 0
    for row in rows:
        size += len(row["text"].encode())
        if size > limit:
            break
        kept.append(row)
    return kept


def ours(folder: Path, rows: list[dict[str, str]], vocab: int) -> tuple[dict[str, float], Pipeline]:
    """CPU seconds of every stage."""
    recipe = RecipeConfig(name="benchmark", output=str(folder / "corpus"))
    for kind in ("prose", "code"):
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["kind"] == kind), encoding="utf-8")
        if path.stat().st_size:
            recipe.sources[kind] = SourceConfig(str(path), kind=kind, language="und", columns=Columns())
    recipe.tokenizer.vocab_size, recipe.tokenizer.compare = vocab, False
    pipeline = Pipeline(recipe, Path(recipe.output))
    seconds = {}
    for stage in STAGES:
        start = time.process_time()
        for step in pipeline.stages[stage]:
            run_step(step, ExecutorConfig(), Console(quiet=True))
        seconds[stage] = time.process_time() - start
    return seconds, pipeline


def timed(work: Callable[[], object]) -> float:
    """CPU seconds of `work`."""
    start = time.process_time()
    work()
    return time.process_time() - start


def datatrove(folder: Path, texts: list[str], tokenizer: Path) -> dict[str, float]:
    """CPU seconds of datatrove's own blocks on the same documents."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer
    from datatrove.utils.hashing import HashConfig

    documents = [Document(text=text, id=str(i)) for i, text in enumerate(texts)]
    filters = [
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
    ]

    def judge() -> None:
        for document in documents:
            for block in filters:  # all of them, as a document that stays meets all of them
                block.filter(document)

    # datatrove's default hash hands strings to xxhash, which from version 4 on takes bytes only.
    config = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))
    signatures = MinhashDedupSignature(str(folder / "signatures"), config)
    writer = MegatronDocumentTokenizer(
        str(folder / "tokens"), tokenizer_name_or_path=str(tokenizer / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    works: dict[str, Callable[[], object]] = {
        "filter": judge,
        "near": lambda: signatures.run(iter(documents)),
        "tokenize": lambda: writer.run(iter(documents)),
    }
    seconds = {}
    for stage, work in works.items():
        try:
            seconds[stage] = timed(work)
        except ImportError as error:  # datatrove splits words with spacy, which the rest does without
            print(f"datatrove's {stage} is left out: {error}")
    return seconds


def datasets_map(folder: Path, texts: list[str], tokenizer: Path) -> dict[str, float]:
    """CPU seconds of `datasets.map` on the same documents: our filter, and the Hugging Face tokenizer."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"text": texts})
    prose = ProseFilter(ProseFilterConfig(check_language=False))
    fast = AutoTokenizer.from_pretrained(str(tokenizer))
    return {
        "filter": timed(
            lambda: table.map(
                lambda row: {"reason": prose.reason(row["text"], "en") or ""},
                cache_file_name=str(folder / "filtered.arrow"),
            )
        ),
        "tokenize": timed(
            lambda: table.map(
                lambda rows: {"ids": fast(rows["text"])["input_ids"]},
                batched=True,
                cache_file_name=str(folder / "tokens.arrow"),
            )
        ),
    }


def main() -> None:
    """Run everything and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", nargs="*", default=[])
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--vocab", type=int, default=8000)
    options = parser.parse_args()
    limit = int(options.megabytes * 1e6)
    rows = read_texts(options.files, limit) if options.files else default_texts(limit)
    megabytes = sum(len(row["text"].encode()) for row in rows) / 1e6
    logging.getLogger("transformers").setLevel(logging.ERROR)
    loguru.logger.disable("datatrove")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        seconds, pipeline = ours(folder, rows, options.vocab)
        tokenizer = pipeline.steps["tokenizer"].folder / "tokenizer"
        # The others get what our filter was given and what our tokenize stage was given, so that MB/s compare.
        kept = [d.text for shard in range(len(pipeline.corpus.shards())) for _, d in pipeline.corpus.read(shard)]
        kept_megabytes = sum(len(text.encode()) for text in kept) / 1e6
        others = {
            "datatrove": datatrove(folder, kept, tokenizer),
            "datasets.map": datasets_map(folder, kept, tokenizer),
        }
        backend = FastTokenizer(tokenizer).backend_tokenizer
        alone = timed(lambda: backend.encode_batch(kept, add_special_tokens=False))
    table = Table(
        title=f"{megabytes:.1f} MB of text, {len(rows)} documents ({kept_megabytes:.1f} MB kept), {os.cpu_count()} cores"
    )
    for heading in (
        "stage",
        "share of the pipeline",
        "ours MB/s a core",
        "datatrove",
        "datasets.map",
        "encode_batch alone",
    ):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    total = sum(seconds.values())
    for stage, spent in seconds.items():
        size = megabytes if stage in ("read", "normalize", "filter") else kept_megabytes
        cells = [f"{kept_megabytes / others[name][stage]:.2f}" if stage in others[name] else "" for name in others]
        table.add_row(
            stage, f"{spent / total:.1%}", f"{size / spent:.2f}" if spent > 0.005 else "", *cells,
            f"{kept_megabytes / alone:.2f}" if stage == "tokenize" else "",
        )  # fmt: skip
    table.add_row("all", "100.0%", f"{megabytes / total:.2f}", "", "", "")
    Console(width=130).print(table)
    print(f"tokenize / encode_batch alone = {seconds['tokenize'] / alone:.2f} (CPU time, same text)")


if __name__ == "__main__":
    main()
