"""What the data order costs a sample: locating it, shuffling it, reading it, and a whole loader step.

python benchmarks/data_order.py [sources=20] [seq_len=4096]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

from megatron_lite.data.blend import Blend, open_blend
from megatron_lite.data.config import DataConfig, GroupConfig, PhaseConfig, SourceConfig
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.loader import DataLoader
from megatron_lite.data.permutation import make_key, permute
from megatron_lite.data.sidecar import TokenizerIdentity

EOD = 1


def microseconds(work: Callable[[int], object], *, repeats: int, start: int = 0) -> float:
    """Time of work(i) for i = start, start + 1, ..."""
    begin = time.perf_counter()
    for i in range(start, start + repeats):
        work(i)
    return 1e6 * (time.perf_counter() - begin) / repeats


def make_blend(folder: Path, *, sources: int, seq_len: int, reset_attention: bool) -> Blend:
    """A blend of three phases over `sources` files of 2 million tokens."""
    rng = np.random.default_rng(0)
    config = DataConfig(seq_len=seq_len, reset_attention=reset_attention)
    for number in range(sources):
        name = f"source{number}"
        with IndexedWriter(folder / name, "uint16") as writer:
            for length in rng.integers(10, 2000, 2000):
                writer.add_document(np.append(rng.integers(2, 50_000, length), EOD))
        group = config.groups.setdefault(f"group{number % 3}", GroupConfig())
        group.sources[name] = SourceConfig(str(folder / name))
    config.phases = [PhaseConfig(until_fraction=0.3), PhaseConfig(until_fraction=0.6, weights={"group0": 1.0})]
    config.phases.append(PhaseConfig(weights={"group1": 1.0, "group2": 2.0}))
    tokenizer = TokenizerIdentity(fingerprint="", name="none", eod=EOD, vocab_size=50_000)
    return open_blend(config, tokenizer=tokenizer, seed=0, total_samples=10**9)


def main(sources: int = 20, seq_len: int = 4096) -> None:
    """Print one line a part, in microseconds a sample."""
    key = make_key(0, "x", 0)
    print(f"{'permute over 10^9 windows':44s}{microseconds(lambda i: permute(i, 10**9, key), repeats=50_000):8.1f} us")
    for reset in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            blend = make_blend(Path(folder), sources=sources, seq_len=seq_len, reset_attention=reset)
            if not reset:
                for start in (0, 10**13):
                    cost = microseconds(blend.locate, repeats=20_000, start=start)
                    print(f"{f'locate among {sources} sources, from sample {start:.0e}':44s}{cost:8.1f} us")
            label = f"example of {seq_len} tokens" + (", documents marked" if reset else "")
            print(f"{label:44s}{microseconds(blend.__getitem__, repeats=3_000):8.1f} us")
            loader = DataLoader(blend, micro_batch_size=8)
            with closing(loader.steps(0, lambda consumed: 64)) as steps:
                cost = microseconds(lambda i: next(steps), repeats=30) / 64
            print(f"{label + ', in loader steps':44s}{cost:8.1f} us = {seq_len / cost:.1f} M tokens/s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
