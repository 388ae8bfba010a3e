"""The support table is true: combinations in which every supported pair of choices occurs run, and give one process's losses."""

from __future__ import annotations

import itertools
import random
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from megatron_lite.commands import evaluate, generate, train
from megatron_lite.config.compose import compose_config
from megatron_lite.training import support
from megatron_lite.training.config import compose_run, validate
from tests import runs
from tests.distributed import run_ranks

LLAMA = ["model.norm=rmsnorm", "model.mlp.activation=swiglu", "model.rope.fraction=1"]
FAMILIES = {
    "nemotron4": [],
    "llama, mistral": ["model.family=llama", *LLAMA],
    "qwen2, qwen3": ["model.family=qwen3", *LLAMA, "model.attention.qk_norm=true"],
    "nemotron_h": [
        "model=nano2_tiny",
        "model.hidden_size=32",
        "model.vocab_size=384",
        "model.mlp.ffn_size=64",
        "model.attention.head_dim=8",
        "model.mamba.heads=4",
        "model.mamba.head_dim=8",
        "model.mamba.state=8",
        "model.num_layers=null",
        "model.pattern=M-*-",
    ],
    "hymba": [
        "model=hymba_tiny",
        "model.hidden_size=32",
        "model.vocab_size=384",
        "model.meta_tokens=4",
        "model.mlp.ffn_size=64",
        "model.attention.head_dim=8",
        "model.attention.value_head_dim=16",
        "model.attention.window=8",
        "model.attention.always_visible=4",
        "model.mamba.head_dim=16",
        "model.mamba.state=4",
        "model.mamba.dt_rank=2",
        "model.num_layers=null",
    ],
}
FREE = [name for name in support.FEATURES if name not in ("command", "processes", "dp")]
LOADED = [name for name in FREE if name not in ("objective", "recompute", "compile")]  # what evaluate reads
Choices = dict[str, str]


def drawn(draw: random.Random) -> Choices:
    """A random combination that can be started; `ranks` is the number of processes."""
    while True:
        choices = {name: draw.choice(list(support.FEATURES[name].choices)) for name in FREE}
        choices["command"] = draw.choice(["train", "train", "train", "evaluate"])
        world_size = draw.choice([1, 2, 2, 2, 4])
        tp, cp, replicas = (2 if choices[name] == "several" else 1 for name in ("tp", "cp", "replicas"))
        if world_size % (tp * cp * replicas) or (world_size == 4 and tp * cp * replicas == 1):
            continue
        # seconds a rank; no pair needs four of them
        if choices["compile"] == "on" and (world_size == 4 or draw.random() < 0.7):
            continue
        choices["processes"] = "1" if world_size == 1 else "several"
        choices["dp"] = "1" if world_size == tp * cp else "several"
        if choices["command"] == "evaluate":
            choices = {name: choices[name] for name in (*LOADED, "command", "processes", "dp")}
        if support.pair_works(choices):
            return choices | {"ranks": str(world_size)}


def pairs(choices: Choices) -> set[tuple[tuple[str, str], ...]]:
    """Every two choices of a combination."""
    return set(itertools.combinations(sorted((k, v) for k, v in choices.items() if k != "ranks"), 2))


@cache
def covering() -> list[Choices]:
    """A small set of combinations that holds every pair which any combination can hold. The same at every call."""
    draw = random.Random(0)
    candidates = [drawn(draw) for _ in range(4000)]
    held = [pairs(choices) for choices in candidates]
    bits = {pair: 1 << i for i, pair in enumerate(sorted(set().union(*held)))}
    masks = [sum(bits[pair] for pair in those) for those in held]  # a pair is a bit: every process of pytest does this
    missing = sum(bits.values())
    chosen = []
    while missing:
        covers = [((mask & missing).bit_count(), choices["ranks"] == "2") for choices, mask in zip(candidates, masks)]
        best = covers.index(max(covers))
        chosen.append(candidates[best])
        missing &= ~masks[best]
    return chosen


def overrides(choices: Choices, teacher: Path) -> list[str]:
    """The command line of a combination."""
    words = [] if choices["command"] == "evaluate" else list(FAMILIES[choices["family"]])
    for name in FREE:
        if name in choices and name not in ("family", "all_gather", "offload"):
            words += support.FEATURES[name].choices[choices[name]].replace("PATH", str(teacher)).split()
    if "fp8" in choices["precision"]:
        words.append("precision.backend=emulated")  # any size, any machine
        words.append(f"precision.all_gather={choices['all_gather']}")
    if choices["offload"] == "on":
        words.append(f"engine.{'offload_optimizer' if choices['engine'].startswith('zero') else 'cpu_offload'}=true")
    return words


def started(rank: int, world_size: int, command: str, words: list[str]) -> int:
    """One command on a rank of the pool."""
    compile_layer = torch.nn.Module.compile
    with runs.as_rank(rank, world_size) as patch:
        # the default backend would call a C++ compiler for half a minute; that its code is right is torch's affair
        patch.setattr(torch.nn.Module, "compile", lambda self: compile_layer(self, backend="aot_eager"))
        if command == "train":
            return train.train(compose_run(words))
        if command == "evaluate":
            return evaluate.evaluate(evaluate.compose_evaluate(words))
        return generate.generate(compose_config(command, generate.GenerateConfig, words))


@pytest.fixture(scope="module")
def references(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(family, objective) -> a finished run of two steps in one process; all learn from one and the same teacher."""
    folder = tmp_path_factory.mktemp("families")
    made = {}
    for objective, how in support.FEATURES["objective"].choices.items():
        for family, words in FAMILIES.items():
            made[family, objective] = folder / str(len(made))
            learned = how.replace("PATH", str(made["nemotron4", "next token"])).split()
            runs.run(tiny_data, made[family, objective], "train.max_steps=2", *words, *learned)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(covering())))
def test_every_supported_pair_runs(
    number: int, tiny_data: Path, references: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    choices = covering()[number]
    words = overrides(choices, references["nemotron4", "next token"])
    reference = references[choices["family"], choices.get("objective", "next token")]
    if choices["command"] == "evaluate":
        if choices["precision"] == "fp8_delayed":  # it computes with the scales that training found
            reference = tmp_path / "delayed"
            trained = ["train.max_steps=2", *FAMILIES[choices["family"]]]
            runs.run(tiny_data, reference, *trained, "precision=fp8_delayed", "precision.backend=emulated")
        data = ["--config-dir", str(tiny_data), f"checkpoint={reference}", "data=tiny", "data.seq_len=32"]
        assert run_ranks(int(choices["ranks"]), started, "evaluate", [*data, *words]) == [0] * int(choices["ranks"])
        return
    line = runs.arguments(
        tiny_data, tmp_path / "r", "train.max_steps=2", "train.micro_batch_size=2", "watchdog.timeout_seconds=0", *words
    )
    assert run_ranks(int(choices["ranks"]), started, "train", line) == [0] * int(choices["ranks"])
    # bf16 rounds to 8 bits, FP8 to 4; layouts only order fp32 sums otherwise. The loss of a distillation, 0.02 here, is a small
    # difference of two cross-entropies of 6, so there the absolute difference counts.
    relative, absolute = {"fp32": (1e-5, 0.0), "bf16": (5e-3, 5e-4)}.get(choices["precision"], (3e-2, 2e-3))
    for row, wanted in zip(runs.rows(tmp_path / "r"), runs.rows(reference), strict=True):
        for key in {"loss", "ce"} & wanted.keys():
            assert row[key] == pytest.approx(wanted[key], rel=relative, abs=absolute), key


def test_the_set_is_small_and_complete() -> None:
    """Every pair of choices that the table supports and that one command can hold occurs."""
    assert len(covering()) <= 36
    found = set().union(*map(pairs, covering()))
    assert found == set().union(*(pairs(drawn(draw)) for draw in [random.Random(1)] for _ in range(4000)))


@pytest.mark.parametrize(
    ("command", "ranks", "words", "says"),
    [
        ("train", 2, ["engine=deepspeed", "parallel.dp_replicate=2"], r"parallel\.dp_replicate=2"),
        ("train", 1, ["engine.cpu_offload=true"], r"engine\.cpu_offload=true with 1 process:"),
        ("train", 2, ["engine.cpu_offload=true"], None),
        ("evaluate", 2, ["engine=deepspeed"], "engine=deepspeed"),
        ("generate", 2, ["parallel.sequence_parallel=true", "parallel.tp=2"], r"parallel\.sequence_parallel=true"),
        ("generate", 2, [], "2 data-parallel processes"),
        ("generate", 2, ["parallel.cp=2"], r"parallel\.cp=2.*parallel\.cp=1"),
        ("train", 2, ["parallel.cp=2", "engine=deepspeed"], r"engine=deepspeed with parallel\.cp=2.*engine=fsdp"),
    ],
)
def test_what_the_table_does_not_support_is_refused(
    command: str, ranks: int, words: list[str], says: str | None
) -> None:
    """By the validation of the command itself."""
    if command == "train":
        check = partial(validate, compose_run(["experiment=smoke", "train.micro_batch_size=4", *words]))
    else:
        schema = {"evaluate": evaluate.EvaluateConfig, "generate": generate.GenerateConfig}[command]
        check = compose_config(command, schema, ["checkpoint=x", *words]).validate
    with pytest.raises(ValueError, match=says) if says else nullcontext():
        check(world_size=ranks)


def test_the_page_is_printed_from_the_table() -> None:
    page = Path(__file__).parent.parent.parent / "docs" / "support.md"
    assert page.read_text() == support.document(), "python -m megatron_lite.training.support > docs/support.md"
