"""evaluate and generate on several processes: the numbers and the text of one, and errors that are told once."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from megatron_lite.commands.evaluate import compose_evaluate, measure
from megatron_lite.commands.generate import GenerateConfig, texts
from megatron_lite.config.compose import compose_config
from megatron_lite.errors import CheckpointError
from megatron_lite.ranks import Ranks
from megatron_lite.runtime import Runtime
from tests.distributed import run_ranks
from tests.hf_folders import make_folder

SECONDS = 180  # for a job: the first one of a pool imports the package


def place(rank: int, world_size: int) -> tuple[Runtime, Ranks]:
    runtime = Runtime(rank, world_size, rank, torch.device("cpu"))
    return runtime, Ranks(dist.new_group(backend="gloo") if world_size > 1 else None)


def losses(rank: int, world_size: int, *words: str) -> dict[str, float]:
    return measure(compose_evaluate(list(words)), *place(rank, world_size)).losses


def text(rank: int, world_size: int, *words: str) -> str:
    return "".join(texts(compose_config("generate", GenerateConfig, list(words)), *place(rank, world_size)))


def refused(rank: int, world_size: int, *words: str) -> str:
    with pytest.raises(CheckpointError) as raised:
        losses(rank, world_size, *words)
    return str(raised.value)


@pytest.fixture(scope="module")
def evaluated(tiny_data, straight):
    """The arguments, and the losses of one process."""
    words = ["--config-dir", str(tiny_data), "data=tiny", "data.seq_len=32", f"checkpoint={straight}"]
    words.append("data.validation.windows=3")  # does not divide over ranks: blank windows fill up
    return words, losses(0, 1, *words)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ["parallel.tp=2"]),
        (2, ["engine.shard=none"]),
        (4, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
        (4, ["parallel.dp_replicate=2"]),
        (4, ["parallel.cp=2"]),
    ],
)
def test_evaluate_gives_the_losses_of_one_process(ranks, layout, evaluated):
    words, expected = evaluated
    for found in run_ranks(ranks, losses, *words, *layout, timeout=SECONDS):
        assert found == pytest.approx(expected, rel=1e-6)  # sums of 96 tokens in fp32, in another order


def test_generate_gives_the_text_of_one_process_for_hybrids(tiny_data, tmp_path):
    """States and convolutions in the cache, by state-space groups."""
    tokenizer = tiny_data / "tokenizer"
    make_folder(tmp_path / "hf", "nemotron_h", tokenizer=tokenizer)
    words = [f"checkpoint={tmp_path / 'hf'}", "prompt=the model", "max_new_tokens=12"]
    expected = text(0, 1, *words)
    assert len(expected) > len("the model\n")
    assert run_ranks(2, text, *words, "parallel.tp=2", timeout=SECONDS) == [expected] * 2


def test_generate_gives_the_text_of_one_process(straight):
    words = [f"checkpoint={straight}", "prompt='the model'", "max_new_tokens=24"]
    expected = text(0, 1, *words)
    assert run_ranks(2, text, *words, "parallel.tp=2", timeout=SECONDS) == [expected] * 2


@pytest.mark.parametrize("key", ["parallel.tp=3", "parallel.cp=3"])
def test_a_layout_that_does_not_fit_is_refused_on_every_rank(key, evaluated):
    name, value = key.removeprefix("parallel.").split("=")
    for message in run_ranks(2, refused, *evaluated[0], key, timeout=SECONDS):
        assert key in message or f"{name}({value})" in message


@pytest.mark.parametrize(
    ("key", "says"),
    [("parallel.tp=1", "2 data-parallel processes"), ("parallel.sequence_parallel=true", "sequence_parallel")],
)
def test_generate_refuses_what_it_cannot_divide(key, says):
    config = compose_config("generate", GenerateConfig, ["checkpoint=x", "prompt=a", "parallel.tp=2", key])
    with pytest.raises(ValueError, match=says):
        config.validate(world_size=2)


def test_deepspeed_is_refused_for_evaluation():
    config = compose_evaluate(["checkpoint=x", "engine=deepspeed"])
    with pytest.raises(ValueError, match=r"engine=deepspeed.*engine=fsdp"):
        config.validate()


@pytest.mark.slow
def test_an_error_is_told_once(evaluated, tmp_path):
    """Two real processes: one line of error from rank 0, none from rank 1."""
    words = [w for w in evaluated[0] if not w.startswith("checkpoint=")] + [f"checkpoint={tmp_path / 'nowhere'}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    ended = subprocess.run(
        [*launcher, "megatron_lite", "evaluate", *words, "parallel.tp=2"], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode != 0
    assert [line for line in ended.stderr.splitlines() if line.startswith("error:")] == [
        next(line for line in ended.stderr.splitlines() if "nowhere does not exist" in line)
    ]
