"""Generation: what the cache takes and how fast tokens come, by model family and prompt length, at equal numbers of parameters.

    python benchmarks/generation.py [--hidden 256] [--batch 4] [--new 16] [--prompts 256 1024 4096]

A transformer (`*-` repeated) beside a hybrid whose attention layers are as rare as in Nemotron Nano 2 (one in ten). The arithmetic:

    an attention layer      2 G K numbers for each token      G KV groups of K dimensions
    a Mamba-2 layer         H P N fp32 numbers and (taps - 1) W of the convolution, however long the sequence
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from megatron_lite.models.config import AttentionConfig, MambaConfig, MlpConfig, ModelConfig, RopeConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.flops import parameter_count
from megatron_lite.models.initialization import initialize_model_

PATTERNS = {"transformer": "*-" * 5, "hybrid": "M-M-M-M*-M"}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--prompts", type=int, nargs="+", default=[256, 1024, 4096])
    options = parser.parse_args()
    table = Table()
    for column in ("model", "parameters", "prompt", "cache, MB", "arithmetic, MB", "prompt tokens/s", "new tokens/s"):
        table.add_column(column, justify="right")
    for name, config in models(options.hidden).items():
        decoder = Decoder(config).eval()
        initialize_model_(decoder, seed=0)
        for length in options.prompts:
            held, reading, writing = measure(decoder, options.batch, length, options.new)
            expected = options.batch * cache_bytes(config, tokens=length + options.new)
            table.add_row(
                name, f"{parameter_count(config):,}", str(length), f"{held / 1e6:.2f}", f"{expected / 1e6:.2f}", f"{reading:,.0f}",
                f"{writing:,.1f}",
            )  # fmt: skip
    Console(width=120).print(table)


def models(hidden: int) -> dict[str, ModelConfig]:
    """The hybrid, and the transformer with the feed-forward width that gives it as many parameters."""
    base = ModelConfig(
        family="nemotron_h", hidden_size=hidden, vocab_size=1024, max_seq_len=2**20, norm="rmsnorm", pattern=PATTERNS["hybrid"],
        attention=AttentionConfig(heads=hidden // 64, kv_heads=hidden // 64), rope=RopeConfig(fraction=0.0),
        mlp=MlpConfig(ffn_size=4 * hidden), mamba=MambaConfig(heads=hidden // 32, head_dim=64, groups=1, state=128),
    )  # fmt: skip
    transformer = replace(base, pattern=PATTERNS["transformer"])
    missing = parameter_count(base) - parameter_count(transformer)
    width = base.mlp.ffn_size + round(missing / (2 * hidden * PATTERNS["transformer"].count("-")))
    return {"transformer": replace(transformer, mlp=MlpConfig(ffn_size=width)), "hybrid": base}


def cache_bytes(config: ModelConfig, *, tokens: int, width: int = 4) -> int:
    """What the caches of one sequence take by arithmetic; `width`: bytes of a number that is not a state."""
    mamba = config.mamba
    inner = mamba.heads * mamba.head_dim
    attention = 2 * config.attention.kv_heads * config.head_dim * tokens * width
    state = 4 * inner * mamba.state + (mamba.conv - 1) * (inner + 2 * mamba.groups * mamba.state) * width
    return config.symbols.count("*") * attention + config.symbols.count("M") * state


@torch.inference_mode()
def measure(decoder: Decoder, batch: int, length: int, new: int) -> tuple[int, float, float]:
    """(bytes of the cache, prompt tokens a second, new tokens a second)."""
    cache = decoder.new_cache(length + new)
    began = time.perf_counter()
    state_BD = decoder.hidden(torch.randint(0, decoder.config.vocab_size, (batch, length)), cache=cache)[:, -1]
    read = time.perf_counter()
    for _ in range(new):
        next_BT = decoder.logits(state_BD).argmax(dim=-1)[:, None]
        state_BD = decoder.hidden(next_BT, cache=cache)[:, -1]
    written = time.perf_counter()
    return cache.nbytes(), batch * length / (read - began), batch * new / (written - read)


if __name__ == "__main__":
    main()
