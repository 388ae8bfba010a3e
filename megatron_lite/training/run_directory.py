"""What a job writes into its run directory before the first step: its config and a copy of its tokenizer."""

from __future__ import annotations

from pathlib import Path

from megatron_lite.atomic import whole_file, whole_folder
from megatron_lite.config.compose import to_yaml
from megatron_lite.training.config import RunConfig
from megatron_lite.weights import TOKENIZER, copy_tokenizer


def write_config(run: RunConfig) -> None:
    """`config.yaml` of the run directory: the config that this job runs with, whole or not there."""
    with whole_file(Path(run.run.dir) / "config.yaml") as temporary:
        temporary.write_text(to_yaml(run), encoding="utf-8")


def keep_tokenizer(run: RunConfig) -> None:
    """Copy the tokenizer's files into the run directory, so that the run can be evaluated and exported wherever it is moved."""
    target = Path(run.run.dir) / TOKENIZER
    if target.exists():
        return
    with whole_folder(target) as copy:
        copy_tokenizer(Path(run.data.tokenizer), copy)
