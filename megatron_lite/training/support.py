"""Which features work together: the table behind both validation and docs/support.md.

    python -m megatron_lite.training.support > docs/support.md

A feature has choices; a command's config makes one choice of each (`choices_of`). Everything works with everything else, except what
`UNSUPPORTED` names. The tests train a small set of combinations in which every supported pair of choices occurs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_lite.engine.base import EngineConfig
from megatron_lite.parallel.mesh import ParallelConfig
from megatron_lite.precision.dtypes import PrecisionConfig
from megatron_lite.precision.recipes import Precision


@dataclass(frozen=True)
class Feature:
    """A column of the table. choices: choice -> the overrides that make it, as documentation and tests give them."""

    title: str
    choices: Mapping[str, str]


_ENGINES = {
    "fsdp none": "engine=fsdp engine.shard=none",
    "fsdp optimizer": "engine=fsdp engine.shard=optimizer",
    "fsdp full": "engine=fsdp engine.shard=full",
    "zero 1": "engine=deepspeed engine.zero_stage=1",
    "zero 2": "engine=deepspeed engine.zero_stage=2",
    "zero 3": "engine=deepspeed engine.zero_stage=3",
}
_FSDP, _ZERO = tuple(_ENGINES)[:3], tuple(_ENGINES)[3:]

_FP8 = "fp8_current, fp8_block, mxfp8"  # they differ in their scales only

FEATURES: dict[str, Feature] = {
    "command": Feature(
        "Command", {name: f"mlite {name}" for name in ("train", "evaluate", "generate", "convert", "prune")}
    ),
    "family": Feature(
        "Model family",
        {
            "nemotron4": "model.family=nemotron4",
            "llama, mistral": "model.family=llama or mistral",
            "qwen2, qwen3": "model.family=qwen2 or qwen3",
            "nemotron_h": "model.family=nemotron_h",
            "hymba": "model.family=hymba",
        },
    ),
    "objective": Feature(
        "Objective",
        {
            "next token": "objective=next_token",
            "distillation": "objective=distillation objective.teacher=PATH",
        },
    ),
    "engine": Feature("Engine and what it shards", _ENGINES),
    "processes": Feature("Processes", {"1": "", "several": "torchrun --nproc-per-node N"}),
    "tp": Feature("Tensor parallelism", {"1": "parallel.tp=1", "several": "parallel.tp=2"}),
    "sequence_parallel": Feature(
        "Sequence parallelism", {"off": "parallel.sequence_parallel=false", "on": "parallel.sequence_parallel=true"}
    ),
    "cp": Feature("Context parallelism", {"1": "parallel.cp=1", "several": "parallel.cp=2"}),
    "dp": Feature("Data parallelism", {"1": "", "several": "the processes left after tensor and context parallelism"}),
    "replicas": Feature("Replicas (HSDP)", {"1": "parallel.dp_replicate=1", "several": "parallel.dp_replicate=2"}),
    "precision": Feature(
        "Precision",
        {name: f"precision={name}" for name in ("fp32", "bf16", "fp8_delayed")} | {_FP8: "precision=fp8_current"},
    ),
    "all_gather": Feature(
        "All-gather of FP8 layers (FSDP2)", {"bf16": "precision.all_gather=bf16", "fp8": "precision.all_gather=fp8"}
    ),
    "recompute": Feature(
        "Activation recompute", {name: f"parallel.recompute={name}" for name in ("none", "selective", "full")}
    ),
    "compile": Feature("torch.compile", {"off": "parallel.compile=false", "on": "parallel.compile=true"}),
    "offload": Feature(
        "CPU offload", {"off": "", "on": "engine.cpu_offload=true (fsdp), engine.offload_optimizer=true (deepspeed)"}
    ),
}


@dataclass(frozen=True)
class Unsupported:
    """Choices that do not work together. when: feature -> choices; all of them must be met."""

    when: Mapping[str, tuple[str, ...]]
    reason: str
    way_out: str

    def matches(self, choices: Mapping[str, str]) -> bool:
        """Whether `choices` (feature -> choice; a feature that is left out matches nothing) is such a combination."""
        return all(choices.get(feature) in these for feature, these in self.when.items())


UNSUPPORTED: tuple[Unsupported, ...] = (
    Unsupported(
        {"engine": _ZERO, "replicas": ("several",)},
        "ZeRO shards over all data-parallel ranks",
        "set parallel.dp_replicate=1, or engine=fsdp",
    ),
    Unsupported(
        {"engine": _ZERO, "cp": ("several",)},
        "context-parallel ranks shard the model together, which FSDP2 does",
        "set parallel.cp=1, or engine=fsdp",
    ),
    Unsupported(
        {"engine": _FSDP, "offload": ("on",), "processes": ("1",)},
        "one process shards nothing, so FSDP2 has no shards to offload",
        "drop it, or use engine=deepspeed engine.offload_optimizer=true",
    ),
    Unsupported(
        {"command": ("evaluate", "generate", "prune"), "engine": _ZERO},
        "engine=deepspeed only trains",
        "set engine=fsdp, which reads the checkpoints of every engine",
    ),
    Unsupported(
        {"command": ("generate",), "cp": ("several",)},
        "tokens are generated one by one, which leaves no sequence to divide",
        "set parallel.cp=1",
    ),
    Unsupported(
        {"command": ("generate",), "dp": ("several",)},
        "generate divides a model by tensor parallelism only",
        "set parallel.tp to the number of processes, or start parallel.tp processes",
    ),
    Unsupported(
        {"command": ("generate",), "sequence_parallel": ("on",)},
        "tokens are generated one by one, which leaves no sequence to cut",
        "set parallel.sequence_parallel=false",
    ),
    Unsupported(
        {"precision": ("fp8_delayed",), "recompute": ("selective", "full")},
        "a forward pass that runs again would count the largest numbers twice, and with other scales",
        "set parallel.recompute=none, or precision=fp8_current",
    ),
    Unsupported(
        {"precision": ("fp8_delayed",), "compile": ("on",)},
        "torch.compile cannot follow histories",
        "set parallel.compile=false, or precision=fp8_current",
    ),
    Unsupported(
        {"all_gather": ("fp8",), "precision": ("fp32", "bf16")},
        "no layer is in FP8",
        "choose precision=fp8_delayed, fp8_current or fp8_block",
    ),
    Unsupported(
        {"all_gather": ("fp8",), "engine": _ZERO},
        "DeepSpeed gathers weights as they are",
        "set precision.all_gather=bf16, or engine=fsdp",
    ),
    Unsupported(
        {"all_gather": ("fp8",), "offload": ("on",)},
        "FSDP2 moves offloaded shards to the GPU as they are",
        "set precision.all_gather=bf16, or drop the offload",
    ),
    Unsupported(
        {"command": ("convert",), "processes": ("several",)}, "convert runs in one process", "start one process"
    ),
)


def choices_of(
    command: str, *, parallel: ParallelConfig, engine: EngineConfig | None, precision: Precision, world_size: int
) -> tuple[dict[str, str], dict[str, str]]:
    """(feature -> choice, feature -> the setting that made it, for messages) of a command on `world_size` processes.

    Raises ValueError where the degrees do not fit the processes.
    """
    degrees = parallel.degrees(world_size)
    made = {
        "command": (command, f"mlite {command}"),
        "processes": (_count(world_size), f"{world_size} process{'es' if world_size > 1 else ''}"),
        "tp": (_count(degrees.tp), f"parallel.tp={degrees.tp}"),
        "sequence_parallel": _switch("parallel.sequence_parallel", parallel.sequence_parallel),
        "cp": (_count(degrees.cp), f"parallel.cp={degrees.cp}"),
        "dp": (_count(degrees.data_parallel), f"{degrees.data_parallel} data-parallel processes"),
        "replicas": (_count(degrees.dp_replicate), f"parallel.dp_replicate={degrees.dp_replicate}"),
        "precision": (_FP8 if precision.name in _FP8.split(", ") else precision.name, f"precision={precision.name}"),
        "all_gather": (gather := getattr(precision, "all_gather", "bf16"), f"precision.all_gather={gather}"),
        "recompute": (parallel.recompute, f"parallel.recompute={parallel.recompute}"),
        "compile": _switch("parallel.compile", parallel.compile),
    }
    if engine is not None:
        shards = f"zero {engine.zero_stage}" if engine.name == "deepspeed" else f"fsdp {engine.shard}"  # type: ignore[attr-defined]
        key = "offload_optimizer" if engine.name == "deepspeed" else "cpu_offload"
        made["engine"] = (shards, f"engine={engine.name}")
        made["offload"] = _switch(f"engine.{key}", getattr(engine, key))
    return {name: choice for name, (choice, _) in made.items()}, {name: setting for name, (_, setting) in made.items()}


def refuse_unsupported(
    command: str,
    *,
    parallel: ParallelConfig,
    engine: EngineConfig | None = None,
    precision: Precision | None = None,
    world_size: int,
) -> None:
    """Raise ValueError naming the settings that do not work together, and what to do instead. engine None: none is used."""
    choices, settings = choices_of(
        command, parallel=parallel, engine=engine, precision=precision or PrecisionConfig(), world_size=world_size
    )
    for entry in UNSUPPORTED:
        if entry.matches(choices):
            named = " with ".join(settings[feature] for feature in entry.when)
            raise ValueError(f"{named}: {entry.reason}; {entry.way_out}")


def _count(number: int) -> str:
    return "1" if number == 1 else "several"


def _switch(key: str, enabled: bool) -> tuple[str, str]:
    return ("on" if enabled else "off"), f"{key}={str(enabled).lower()}"


def document() -> str:
    """docs/support.md."""
    lines = [
        "# What works together",
        "",
        "Printed by `python -m megatron_lite.training.support > docs/support.md` from the table that validation refuses from.",
        "Everything works with everything else, except what is listed below; the tests train a set of combinations in which",
        "every supported pair occurs.",
        "",
        "## Features",
        "",
        "| feature | choice | how to set it |",
        "|---|---|---|",
    ]
    for feature in FEATURES.values():
        for number, (choice, how) in enumerate(feature.choices.items()):
            lines.append(f"| {feature.title if number == 0 else ''} | {choice} | {f'`{how}`' if '=' in how else how} |")
    lines += ["", "## What is refused", "", "| together | why | instead |", "|---|---|---|"]
    for entry in UNSUPPORTED:
        together = ", ".join(
            f"{FEATURES[name].title.split(' (')[0].lower() if name != 'command' else 'command'}: {' or '.join(choices)}"
            for name, choices in entry.when.items()
        )
        lines.append(f"| {together} | {entry.reason} | {entry.way_out} |")
    lines += ["", "## By engine", "", "| | " + " | ".join(_ENGINES) + " |", "|---" * (1 + len(_ENGINES)) + "|"]
    for name, feature in FEATURES.items():
        if name in ("engine", "command"):
            continue
        for choice in feature.choices:
            cells = ["yes" if pair_works({"engine": engine, name: choice}) else "no" for engine in _ENGINES]
            lines.append(f"| {feature.title}: {choice} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def pair_works(pair: Mapping[str, str]) -> bool:
    """Whether no entry of `UNSUPPORTED` forbids these choices whatever the others are."""
    return not any(entry.matches(pair) for entry in UNSUPPORTED)


if __name__ == "__main__":
    print(document(), end="")
