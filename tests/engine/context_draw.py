"""Random layouts with context parallelism, of random models on random documents, against one process.

    python -m tests.engine.context_draw 40 --seed 1        # by hand: a second or two for each

A draw is a pure function of its seed: one of four families at small odd sizes; windows, meta tokens, shared keys, taps of the
convolution and documents around the length of a slice; any layout of up to eight processes.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.parallel.sequence_length import check_layout
from tests.distributed import run_ranks
from tests.engine import harness
from tests.engine.harness import Case, Trace

# cp, tp, dp_replicate, dp_shard
LAYOUTS = [
    (2, 1, 1, 1), (3, 1, 1, 1), (4, 1, 1, 1), (2, 2, 1, 1), (2, 1, 2, 1), (2, 1, 1, 2), (3, 2, 1, 1), (3, 1, 1, 2), (4, 2, 1, 1),
    (2, 2, 1, 2), (2, 2, 2, 1), (2, 1, 2, 2),
]  # fmt: skip
BORDERS = {"borders": 0, "after borders": 1, "before borders": -1}
DOCUMENTS = ("whole sample", "one token", "random", *BORDERS)
STEPS = 2


@dataclass(frozen=True)
class Draw:
    """documents: one of DOCUMENTS for each sample of a batch; empty: the batch says nothing about documents."""

    case: Case
    world_size: int
    slices: int
    slice_length: int
    documents: tuple[str, ...]

    @property
    def alone(self) -> Draw:
        """The same in one process."""
        return replace(self, case=replace(self.case, parallel={}, engine={}, micro_batch=4), world_size=1)

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.slices * self.slice_length

    def sample(self, step: int, index: int) -> dict[str, Tensor]:
        """Stands in for `harness.sample`."""
        found = harness_sample(step, index, self.length)
        del found["documents"]
        return found | {"documents": self.begins(index).cumsum(0)} if self.documents else found

    def begins(self, index: int) -> Tensor:
        """(T,) bool: where sample `index` has the first token of a document that is not its first."""
        marks, kind = torch.zeros(self.length, dtype=torch.bool), self.documents[index]
        if kind == "one token":
            marks[1:] = True
        elif kind == "random":
            marks = torch.rand(self.length, generator=torch.Generator().manual_seed(index)) < 1.5 / self.slice_length
        elif kind in BORDERS:
            marks[(torch.arange(1, self.slices) * self.slice_length + BORDERS[kind]).clamp(max=self.length - 1)] = True
        return marks


harness_sample = harness.sample


def draw(seed: int) -> Draw:
    """Draw number `seed`."""
    dice = random.Random(seed)
    while True:
        found = _draw(dice)
        try:
            run = harness.run_config(found.case)
            run.model.validate()
            check_layout(run.model, run.parallel, seq_len=found.length)
        except ValueError:
            continue
        return found


def _draw(dice: random.Random) -> Draw:
    pick = dice.choice
    cp, tp, dp_replicate, dp_shard = pick(LAYOUTS)
    slice_length = dice.randint(1, 11)
    parallel = {"cp": cp, "tp": tp, "dp_replicate": dp_replicate, "recompute": pick(["none", "selective", "full"])}
    parallel["sequence_parallel"] = tp > 1 and pick([True, True, False])
    precision = pick(["fp32"] * 6 + ["bf16", "fp8_current", "mxfp8"])
    case = Case(
        parallel,
        {"shard": pick(["none", "optimizer", "full"]), "cpu_offload": dice.random() < 0.15},
        precision,
        _model(dice, slice_length)
        | {"max_seq_len": 2 * cp * slice_length, "init_std": 0.2 if precision == "fp32" else 0.02},
        micro_batch=pick([1, 2, 4] if dp_replicate * dp_shard == 2 else [1, 2]),
    )
    kinds = tuple(pick(DOCUMENTS) for _ in range(harness.SAMPLES)) if dice.random() < 0.8 else ()
    return Draw(case, cp * tp * dp_replicate * dp_shard, 2 * cp, slice_length, kinds)


def _model(dice: random.Random, slice_length: int) -> dict[str, Any]:
    pick = dice.choice
    pattern = pick([None, "*-*", "M*-M", "MM", "*M", "H-HH", "HHH", "H*-H"])
    groups, queries, head_dim = pick([2, 4]), pick([1, 2, 3]), pick([4, 6, 8, 12])
    value_head_dim = pick([4, 8, 10, 16])
    model: dict[str, Any] = {
        "num_layers": None if pattern else 2, "pattern": pattern, "hidden_size": pick([16, 24, 40]),
        "attention.heads": groups * queries, "attention.kv_heads": groups, "attention.head_dim": head_dim,
        "attention.value_head_dim": value_head_dim, "rope.fraction": pick([0.0, 0.5, 1.0]),
        "tie_embeddings": pick([False, True]), "linear_bias": False,
        "mlp.activation": pick(["squared_relu", "swiglu"]), "meta_tokens": pick([0, 0, 1, 2, 4, 7]), "mamba.conv": dice.randint(1, 6),
        "mamba.state": dice.randint(2, 7), "norm": pick(["rmsnorm", "layernorm1p"]),
    }  # fmt: skip
    # Scores do not change when a bias is added to all keys, if these do not rotate: its gradient is 0, and relative to it all is noise.
    biases = model["norm"] == "layernorm1p"
    model["attention.qk_norm"] = not (biases and model["rope.fraction"] == 0.0) and pick([False, True])
    symbols = pattern or "*-*-"
    attending = list(range(sum(symbol in "*H" for symbol in symbols)))
    if attending and dice.random() < 0.6:
        model["attention.window"] = dice.randint(1, 5 * slice_length)
        model["attention.always_visible"] = pick([0, 0, 3, model["meta_tokens"]])
        model["attention.global_layers"] = [number for number in attending if dice.random() < 0.3]
    if len(attending) > 1 and dice.random() < 0.5:
        model["attention.kv_groups"] = [attending[-2:] if dice.random() < 0.5 else attending]
    if "H" in symbols:
        model |= {
            "mamba.version": 1,
            "mamba.heads": groups * queries,
            "mamba.head_dim": value_head_dim,
            "mamba.dt_rank": 2,
        }
    else:
        model |= {"mamba.heads": groups * queries, "mamba.head_dim": pick([2, 5]), "mamba.groups": groups}
        model["linear_bias"] = pick([False, True])
        if "M" not in symbols:
            model["attention.qkv_bias"] = pick([False, True])
    return model


def train(rank: int, world_size: int, draws: list[Draw]) -> list[Trace]:
    """Two steps of each."""
    traces = []
    for found in draws:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(harness, "sample", found.sample)
            traces.append(harness.train(rank, world_size, found.case, steps=STEPS))
    return traces


# loss, gradient norm: relative. Attention's parts and the states of scans are rounded at other places, and FP8's tiles of tokens differ.
# They grow with the weights: large ones, which make attention uneven and gradients much larger than their rounding, are for fp32.
LOW_PRECISION = {"bf16": (2e-5, 2e-3), "fp8_current": (1e-4, 1e-2), "mxfp8": (1e-4, 1e-2)}


def differences(alone: Trace, traces: list[Trace], precision: str) -> list[str]:
    """What is too far from one process: losses and norms, and in fp32 the gradient of every parameter in step 1."""
    if precision == "fp32":  # Adam's step divides by a gradient, however small: weights say less than the moment does
        return [line for line in harness.differences([alone], traces) if not line.startswith("weights")]
    harness.assemble([trace.boxes["end"] for trace in traces])  # ranks hold the same bits of what they share
    found = []
    for name, bound in zip(("losses", "norms"), LOW_PRECISION[precision]):
        wanted, got = getattr(alone, name)[0], getattr(traces[0], name)[0]
        if not abs(wanted - got) <= bound * wanted:
            found.append(f"{name} by {abs(wanted - got) / wanted:.1e}")
    return found


def compare(seeds: Iterable[int]) -> dict[int, list[str]]:
    """What is too far from one process in each draw."""
    draws = {seed: draw(seed) for seed in seeds}
    found = {}
    in_order = sorted(draws, key=lambda seed: draws[seed].world_size)
    for world_size, group in groupby(in_order, key=lambda seed: draws[seed].world_size):
        of_size = list(group)
        results = run_ranks(world_size, train, [draws[seed] for seed in of_size])
        alone = train(0, 1, [draws[seed].alone for seed in of_size])
        for seed, wanted, *traces in zip(of_size, alone, *results):
            found[seed] = differences(wanted, traces, draws[seed].case.precision)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("draws", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for seed, wrong in sorted(compare(range(options.seed, options.seed + options.draws)).items()):
        print(seed, "; ".join(wrong) or "ok", *([draw(seed)] if wrong else []))
