"""From the command line to typed objects: what is understood, what is refused, and how."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_lite.commands.evaluate import EvaluateConfig
from megatron_lite.commands.generate import GenerateConfig
from megatron_lite.config.compose import compose_config, config_dir, from_dict, help_text, to_dict
from megatron_lite.config.errors import ConfigError
from megatron_lite.models.config import ModelConfig
from megatron_lite.training.config import RunConfig, compose_run, validate
from tests.distributed import PATIENCE_SECONDS


def test_smoke_is_typed_and_valid():
    run = compose_run(["experiment=smoke"])
    assert isinstance(run, RunConfig)
    assert run.run.dir == "runs/smoke"
    validate(run, world_size=1)


def test_groups_and_keys_can_be_overridden():
    run = compose_run(["model=llama_tiny", "schedule=constant", "precision=bf16", "parallel.tp=2", "seed=7"])
    assert (run.model.family, run.schedule.name, run.precision.name, run.parallel.tp, run.seed) == (
        "llama", "constant", "bf16", 2, 7,
    )  # fmt: skip


def test_a_recipe_runs_on_either_engine():
    """A recipe chooses how it is sharded by its group, whose keys differ from engine to engine."""
    assert compose_run(["experiment=nemotron4_15b"]).engine.shard == "optimizer"
    assert compose_run(["experiment=nemotron4_15b", "engine=deepspeed"]).engine.name == "deepspeed"
    for file in (config_dir() / "experiment").glob("*.yaml"):
        assert "engine" not in yaml.safe_load(file.read_text()), file.name


def test_a_section_survives_the_manifest():
    model = compose_run(["model=nemotron4_15b"]).model
    assert from_dict(ModelConfig, to_dict(model)) == model


def test_help_names_groups_and_keys():
    text = help_text("train", RunConfig, "purpose")
    assert "schedule=constant|cosine|wsd" in text
    assert "max_steps:" in text


def test_help_lists_the_groups_that_the_command_takes_and_no_others():
    groups = {
        command: re.findall(r"^  (\w+)=", help_text(command, schema, "purpose"), re.MULTILINE)
        for command, schema in (("train", RunConfig), ("evaluate", EvaluateConfig), ("generate", GenerateConfig))
    }
    assert groups["evaluate"] == ["data", "engine", "parallel", "precision"]
    assert groups["generate"] == ["parallel"]
    assert {"model", "engine", "experiment"} < set(groups["train"])
    assert "data_recipe" not in groups["train"]


@pytest.mark.slow
def test_help_may_be_cut_off_by_the_reader():
    command = f"{sys.executable} -m megatron_lite inspect --help | true"
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_stepz=4", "did you mean train.max_steps"),
        ("train.max_steps=many", "could not be converted to Integer"),
        ("model=nemotron9", "choose one of .*llama_tiny"),
        ("--verbose", "--verbose is unknown"),
        ("--config-dir=/nowhere", "/nowhere is not a folder"),
        ("run.dir=caf\udce9", r"run\.dir=caf\\udce9.*not UTF-8"),
    ],
)
def test_what_cannot_be_understood(override, message):
    with pytest.raises(ConfigError, match=message):
        compose_run([override])


def test_a_config_dir_without_the_folder_of_a_group(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("seq_len: 8\n")
    with pytest.raises(ConfigError, match=r"data=mine is unknown; .*mine\.yaml.*give --config-dir \S*0$"):
        compose_run([f"--config-dir={tmp_path / 'data'}", "data=mine"])
    with pytest.raises(ConfigError, match=r"model=mine is unknown; .*has no folder model"):
        compose_run([f"--config-dir={tmp_path}", "model=mine"])


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["parallel.tp=3"], 3, r"not divide by parallel\.tp=3.*parallel\.tp=1 would work"),
        (["parallel.tp=2"], 3, r"tp\(2\).*world size 3"),
        (["data.seq_len=4096"], 1, r"data\.seq_len=4096 is longer than model\.max_seq_len=2048"),
        (["train.max_tokens=5"], 1, "exactly one of them"),
        (["precision.name=fp7"], 1, "fp7"),
        (["engine.shard=half"], 1, r"engine\.shard=half"),
    ],
)
def test_what_does_not_fit_together(overrides, world_size, message):
    with pytest.raises(ValueError, match=message):
        validate(compose_run(["experiment=smoke", *overrides]), world_size=world_size)


@given(st.text(min_size=0, max_size=30).filter(lambda text: "\x00" not in text))
@settings(max_examples=20)
@example("it's ${HOME} \\' =,(")
@pytest.mark.slow
def test_a_prompt_is_taken_letter_by_letter(prompt):
    if len(prompt) > 1 and prompt[0] == prompt[-1] and prompt[0] in "'\"":
        return  # quoted for Hydra by the person
    config = compose_config("generate", GenerateConfig, ["checkpoint=x", f"prompt={prompt}"])
    assert config.prompt == prompt


def test_paths_may_hold_signs_of_the_grammar_and_variables():
    run = compose_run(["experiment=smoke", "run.dir=runs/lr=3,(a) ${run.name}"])
    assert run.run.dir == "runs/lr=3,(a) smoke"
