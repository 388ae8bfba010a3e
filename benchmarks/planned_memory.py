"""What the planner says a rank holds, beside what `benchmarks/memory.py` measures: 16 settings, and how far each part is off.

    python -m benchmarks.planned_memory [--only 3 7]

Every mode meets every family, and so do the recompute modes and the numbers of ranks: each pair of values of two of these four occurs.
Precision, the ZeRO stage and sequence parallelism alternate. Exits with 1 when a part is off by more than its limit: 10 % with FSDP2
and tensor parallelism, 20 % with ZeRO, of the whole that a rank holds at that time (a small part may be off by more of itself).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.memory import measured
from megatron_lite.data.config import DataConfig
from megatron_lite.engine.deepspeed import DeepSpeedConfig
from megatron_lite.engine.fsdp import FsdpConfig
from megatron_lite.models.config import AttentionConfig, MambaConfig, MlpConfig, ModelConfig
from megatron_lite.objectives.next_token import NextTokenConfig
from megatron_lite.parallel.mesh import RECOMPUTE_MODES, ParallelConfig
from megatron_lite.planner.memory import Memory, memory
from megatron_lite.precision.dtypes import PrecisionConfig
from megatron_lite.training.config import RunConfig
from megatron_lite.training.planning import job_of
from megatron_lite.training.trainer import TrainConfig

MIB = 2**20
LENGTH, VOCABULARY, WIDTH = 256, 4096, 256
PARTS = ("weights", "optimizer", "gradients", "other", "peak")
MODES = ("fsdp none", "fsdp optimizer", "fsdp full", "tp", "zero")
RANKS = (1, 2, 4)


def families() -> dict[str, ModelConfig]:
    """Models whose tensors, not the interpreter, are what is measured."""
    attention, mlp = AttentionConfig(heads=8, kv_heads=4), MlpConfig(ffn_size=4 * WIDTH)
    plain = ModelConfig(
        family="nemotron4", num_layers=4, hidden_size=WIDTH, attention=attention, mlp=mlp, vocab_size=VOCABULARY,
        max_seq_len=LENGTH,
    )  # fmt: skip
    mamba = MambaConfig(heads=8, head_dim=64, groups=4, state=32)
    hybrid = replace(plain, family="nemotron_h", num_layers=None, pattern="M-M*-M-", norm="rmsnorm", mamba=mamba)
    hymba = replace(
        plain, family="hymba", num_layers=None, pattern="H-H-H-H-", norm="rmsnorm", meta_tokens=16,
        mlp=replace(mlp, activation="swiglu"), mamba=MambaConfig(version=1, heads=4, head_dim=128, state=16, dt_rank=16),
        attention=AttentionConfig(
            heads=4, kv_heads=2, head_dim=64, value_head_dim=128, window=64, global_layers=[0, 3], kv_groups=[[1, 2]]
        ),
    )  # fmt: skip
    return {"nemotron4": plain, "hybrid": hybrid, "hymba": hymba, "tied": replace(plain, tie_embeddings=True)}


@dataclass(frozen=True)
class Setting:
    """One row."""

    mode: str
    family: str
    recompute: str
    ranks: int
    precision: str
    layout: dict[str, Any]
    micro_batches: int = 1

    @property
    def engine(self) -> FsdpConfig | DeepSpeedConfig:
        """zero 1, 2, 3; fsdp none, optimizer, full; tensor parallelism shards nothing else."""
        kind, _, how = self.mode.partition(" ")
        return DeepSpeedConfig(zero_stage=int(how)) if kind == "zero" else FsdpConfig(shard=how or "none")

    @property
    def limit(self) -> float:
        """How far a part may be off."""
        return 0.2 if self.mode.startswith("zero") else 0.1

    def run(self) -> RunConfig:
        """Its config."""
        ranks = self.ranks // self.layout.get("tp", 1)
        return RunConfig(
            model=families()[self.family],
            engine=self.engine,
            parallel=ParallelConfig(recompute=self.recompute, **self.layout),
            objective=NextTokenConfig(),
            precision=PrecisionConfig(self.precision),
            data=DataConfig(seq_len=LENGTH),
            train=TrainConfig(micro_batch_size=2, global_batch_size=2 * ranks * self.micro_batches),
        )


def settings() -> list[Setting]:
    """Modes x families; recompute mode and ranks shift by the sum of the two, one and two steps a family. And replicas, accumulation
    and tied embeddings."""
    rows = []
    for m, mode in enumerate(MODES):
        for f, family in enumerate(("nemotron4", "hybrid", "hymba")):
            ranks = RANKS[(m + 2 * f) % 3]
            layout: dict[str, Any] = {}
            if mode == "tp" and ranks > 1:
                layout = {"tp": 2, "sequence_parallel": f == 1}
            rows.append(
                Setting(
                    mode=f"zero {f + 1}" if mode == "zero" else mode,
                    family=family,
                    recompute=RECOMPUTE_MODES[(m + f) % 3],
                    ranks=ranks,
                    precision="bf16" if (m + f) % 2 else "fp32",
                    layout=layout,
                )
            )
    hsdp = Setting("fsdp full", "tied", "selective", 4, "bf16", {"dp_replicate": 2}, micro_batches=2)
    return [*rows, hsdp]


def by_part(plan: Memory) -> dict[str, int]:
    """The parts that `benchmarks/memory.py` measures: the peak is what a step adds."""
    weights, optimizer = (plan.staying.get(part, 0) for part in ("weights", "optimizer"))
    staying = sum(plan.staying.values())
    return {
        "weights": weights,
        "optimizer": optimizer,
        "gradients": plan.gradients - plan.staying.get("gradients", 0),
        "other": staying - weights - optimizer,
        "peak": plan.total - staying,
    }


def off(planned: dict[str, int], found: dict[str, int]) -> dict[str, float]:
    """By how much each part is off, and the whole at the peak: of what is held when the part is held."""
    staying = sum(found[part] for part in ("weights", "optimizer", "other"))
    whole = {"gradients": staying + found["gradients"], "peak": staying + found["peak"]}
    errors = {part: (planned[part] - found[part]) / whole.get(part, staying) for part in PARTS}
    total = sum(planned[part] - found[part] for part in ("weights", "optimizer", "other", "peak"))
    return errors | {"total": total / whole["peak"]}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of settings, from 0")
    options = parser.parse_args()
    table = Table(title=f"MiB of rank 0 planned / measured; {VOCABULARY:,} words, width {WIDTH}, 2 x {LENGTH} tokens")
    for column in ("", "mode", "family", "recompute", "ranks", "precision", *PARTS, "peak, whole", "off"):
        table.add_column(column)
    worst_of_all = True
    for index, setting in enumerate(settings()):
        if options.only is None or index in options.only:
            worst_of_all &= add_row(table, index, setting)
    Console(width=190).print(table)
    sys.exit(0 if worst_of_all else 1)


def add_row(table: Table, index: int, setting: Setting) -> bool:
    """Measure and plan one setting. Returns whether it is within its limit."""
    run = setting.run()
    found, _ = measured(run, setting.ranks)
    plan = memory(job_of(run, setting.ranks), device="cpu")
    planned = by_part(plan)
    errors = off(planned, found)
    worst = max(errors, key=lambda part: abs(errors[part]))
    layout = "".join(f" {key}={value}" for key, value in setting.layout.items())
    table.add_row(
        str(index), setting.mode + layout, setting.family, setting.recompute, str(setting.ranks), setting.precision,
        *(f"{planned[part] / MIB:.1f}/{found[part] / MIB:.1f}" for part in PARTS), f"{errors['total']:+.1%}",
        f"{worst} {errors[worst]:+.1%}",
    )  # fmt: skip
    print(index, plan.moment, plan.parts, flush=True)
    return abs(errors[worst]) <= setting.limit


if __name__ == "__main__":
    main()
