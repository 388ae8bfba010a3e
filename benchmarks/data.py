"""Is the data ever what a run waits for? What opening a corpus takes, and how fast samples come beside what a step needs.

    python -m benchmarks.data
    python -m benchmarks.data --size tiny --turns 2

First table: a blend over one file of so many documents is opened (sparse files: the numbers that opening looks at are written, the
rest are holes, so they take no room on the disk), and a sample from its middle is read: the first time, and the median of `--turns` times.
Memory is what this process holds afterwards and did not before, mapped files left out.

Second table: a blend of three phases over 20 files of 2 million tokens, read in order from memory: what a part costs a sample, and the
tokens/s of the loader as the training loop calls it. The last column is these tokens/s over those that one rank needs:

    here        measured: a step of `benchmarks/train_step.py`'s small model, in turn with the loader, on the same threads
    one H100    computed: a model of 1 billion parameters at half of the GPU's bf16 peak
"""

from __future__ import annotations

import argparse
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers.ours import overrides
from benchmarks.peers.serving import Work
from benchmarks.summary import count, heading, markdown
from benchmarks.throughput import MODELS
from benchmarks.train_step import SIZES as STEP_SIZES
from megatron_lite.data.blend import Blend, open_blend
from megatron_lite.data.config import DataConfig, GroupConfig, PhaseConfig, SourceConfig
from megatron_lite.data.indexed import HEADER, MAGIC, VERSION, IndexedWriter
from megatron_lite.data.loader import DataLoader
from megatron_lite.data.permutation import make_key, permute
from megatron_lite.data.sidecar import TokenizerIdentity
from megatron_lite.hardware import gpu_named
from megatron_lite.models.flops import flops_per_token
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.training.build import build_engine
from megatron_lite.training.config import compose_run

EOD, TOKENS_OF_A_DOCUMENT, SAMPLES = 1, 1000, 10**9
TOKENIZER = TokenizerIdentity(fingerprint="", name="none", eod=EOD, vocab_size=50_000)
# documents of the files that are opened, sources of the blend, tokens of a sample, samples of a step, the model that takes a step here
SIZES = {
    "full": ((10**4, 10**6, 10**8), 20, 4096, 64, "small"),
    "tiny": ((10**2, 10**4), 3, 64, 4, "tiny"),
}


def write_sparse(prefix: Path, documents: int) -> None:
    """A pair of files whose ends are right and whose middle is a hole (zeros)."""
    lengths, pointers = HEADER.size, HEADER.size + 4 * documents
    index = pointers + 8 * documents
    size = 2 * TOKENS_OF_A_DOCUMENT  # bytes
    with Path(f"{prefix}.idx").open("wb") as file:
        file.truncate(index + 8 * (documents + 1))
        for at, content in [
            (0, HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1)),
            (lengths, struct.pack("<2i", TOKENS_OF_A_DOCUMENT, TOKENS_OF_A_DOCUMENT)),
            (pointers - 4, struct.pack("<i", TOKENS_OF_A_DOCUMENT)),
            (pointers, struct.pack("<2q", 0, size)),
            (index - 8, struct.pack("<q", (documents - 1) * size)),
            (index, struct.pack("<2q", 0, 1)),
            (index + 8 * documents, struct.pack("<q", documents)),
        ]:
            file.seek(at)
            file.write(content)
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(documents * size)
        for at in (size - 2, documents * size - 2):
            file.seek(at)
            file.write(struct.pack("<H", EOD))


def opened(prefix: Path, seq_len: int, times: int) -> tuple[float, float, float, float]:
    """(seconds until the blend is open for the first time, median of all times, until a sample is read, MB that the process holds more)."""
    config = DataConfig(seq_len=seq_len, groups={"web": GroupConfig(sources={"crawl": SourceConfig(str(prefix))})})
    before, seconds = own_memory(), []
    for _ in range(times):
        began = time.perf_counter()
        blend = open_blend(config, tokenizer=TOKENIZER, seed=0, total_samples=SAMPLES)
        open_after = time.perf_counter() - began
        blend[123_456_789 % blend.sources["web/crawl"].num_windows]
        seconds.append((open_after, time.perf_counter() - began))
    return seconds[0][0], *map(statistics.median, zip(*seconds)), own_memory() - before


def own_memory() -> float:
    """Resident memory of this process in MB without mapped files (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1000
    return float("nan")


def opening_row(documents: int, seq_len: int, folder: str, *, times: int) -> list[str]:
    """A line of the first table."""
    prefix = Path(folder) / f"documents_{documents}"
    write_sparse(prefix, documents)
    index = Path(f"{prefix}.idx").stat().st_size / 1e6
    *times_taken, memory = opened(prefix, seq_len, times)
    seconds = [f"{1e3 * one:.1f}" for one in times_taken]
    return [f"{documents:,}", f"{documents * TOKENS_OF_A_DOCUMENT:,}", f"{index:,.1f}", *seconds, f"{memory:.1f}"]


def three_phases(folder: Path, *, sources: int, seq_len: int, reset_attention: bool) -> Blend:
    """A blend of three phases over `sources` files of 2 million tokens."""
    rng = np.random.default_rng(0)
    config = DataConfig(seq_len=seq_len, reset_attention=reset_attention)
    for number in range(sources):
        name = f"source{number}"
        if not (folder / f"{name}.idx").exists():
            with IndexedWriter(folder / name, "uint16") as writer:
                for length in rng.integers(10, 2000, 2000):
                    writer.add_document(np.append(rng.integers(2, 50_000, length), EOD))
        group = config.groups.setdefault(f"group{number % 3}", GroupConfig())
        group.sources[name] = SourceConfig(str(folder / name))
    config.phases = [PhaseConfig(until_fraction=0.3), PhaseConfig(until_fraction=0.6, weights={"group0": 1.0})]
    config.phases.append(PhaseConfig(weights={"group1": 1.0, "group2": 2.0}))
    return open_blend(config, tokenizer=TOKENIZER, seed=0, total_samples=SAMPLES)


def microseconds(work: Callable[[int], object], *, repeats: int, start: int = 0) -> float:
    """The mean time of work(i) for i = start, start + 1, ..."""
    began = time.perf_counter()
    for i in range(start, start + repeats):
        work(i)
    return 1e6 * (time.perf_counter() - began) / repeats


@contextmanager
def loading(blend: Blend, samples: int) -> Iterator[Callable[[], float]]:
    """Seconds that the loop waits for the next step of `samples` samples, when it asks for one after another."""
    with closing(DataLoader(blend, micro_batch_size=samples).steps(0, lambda consumed: samples)) as steps:
        yield lambda: microseconds(lambda i: next(steps), repeats=8) / 1e6


@contextmanager
def training(model: str, threads: int) -> Iterator[tuple[Callable[[], float], int]]:
    """(seconds of a training step here, its tokens)."""
    with tempfile.TemporaryDirectory() as folder:
        work = Work(**STEP_SIZES[model], batch=8, log_every=1, threads=threads, compiled=False, folder=folder)
        engine = build_engine(compose_run(overrides(work)), Mesh())
        tokens, targets = work.tokens()
        batch = {"tokens": tokens, "targets": targets, "loss_mask": torch.ones_like(tokens, dtype=torch.bool)}
        yield lambda: microseconds(lambda i: engine.train_step([batch], lr=1e-4), repeats=1) / 1e6, tokens.numel()


def needed_by_gpu() -> float:
    """Tokens/s of one H100 that trains the model of 1 billion parameters at half of its peak."""
    model = MODELS["model"]
    return 0.5 * gpu_named("h100").flops("bf16") / flops_per_token(model, model.max_seq_len)


def reading_rows(options: argparse.Namespace, folder: Path) -> list[list[str]]:
    """The second table."""
    _, sources, seq_len, samples, model = SIZES[options.size]
    key = make_key(0, "x", 0)
    rows = [["permutation of 10^9 windows", f"{microseconds(lambda i: permute(i, 10**9, key), repeats=20_000):.1f}"]]
    gpu = needed_by_gpu()
    for reset in (False, True):
        blend = three_phases(folder, sources=sources, seq_len=seq_len, reset_attention=reset)
        if not reset:
            cost = microseconds(blend.locate, repeats=10_000, start=10**13)
            rows.append([f"source and number among {sources} sources, at sample 10^13", f"{cost:.1f}"])
        what = "data.reset_attention=" + str(reset).lower()
        cost = microseconds(blend.__getitem__, repeats=1000)
        rows.append([f"sample of {seq_len:,} tokens, {what}", f"{cost:.1f}"])
        with loading(blend, samples) as load, training(model, options.threads) as (train, tokens):
            train(), load()  # the first of each allocates
            turns = [(samples * seq_len / load(), tokens / train()) for _ in range(options.turns)]
        rate = statistics.median(loaded for loaded, _ in turns)
        here = statistics.median(loaded / trained for loaded, trained in turns)
        cost = f"{1e6 * seq_len / rate:.1f}"
        rows.append(
            [
                f"loader, {samples} samples a step, {what}",
                cost,
                f"{rate / 1e6:.1f}",
                f"{here:,.0f}",
                f"{rate / gpu:,.0f}",
            ]
        )
    return [row + [""] * (len(COLUMNS) - len(row)) for row in rows]


OPENING = "documents", "tokens", "index, MB", "open first, ms", "open, ms", "first sample, ms", "memory, MB"
COLUMNS = "part", "us a sample", "million tokens/s", "over a step here", "over one H100"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the two tables."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    where = heading(threads=options.threads)
    documents, _, seq_len, _, _ = SIZES[options.size]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        opening_row(10, seq_len, folder, times=1)  # what is done once in a process is not the files'
        opening = [opening_row(number, seq_len, folder, times=options.turns) for number in documents]
        reading = reading_rows(options, Path(folder))
    print(where, markdown(OPENING, opening), markdown(COLUMNS, reading), sep="\n\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--turns", type=count, default=7)
    parser.add_argument("--folder", type=Path, help="of the files; default: the one for temporary files")
    parser.add_argument("--threads", type=count, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
