"""What a job writes into its run directory before the first step: its config and a copy of its tokenizer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_lite.config.compose import to_yaml
from megatron_lite.training.config import RunConfig
from megatron_lite.weights import TOKENIZER, copy_tokenizer


def write_config(run: RunConfig) -> None:
    """`config.yaml` of the run directory: the config that this job runs with, whole or not there."""
    target = Path(run.run.dir) / "config.yaml"
    temporary = target.with_suffix(".yaml.tmp")
    try:
        temporary.write_text(to_yaml(run), encoding="utf-8")
        os.replace(temporary, target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def keep_tokenizer(run: RunConfig) -> None:
    """Copy the tokenizer's files into the run directory, so that the run can be evaluated and exported wherever it is moved."""
    target = Path(run.run.dir) / TOKENIZER
    if target.exists():
        return
    copy = target.with_name(f".tmp-{TOKENIZER}")  # whole or not there: a job may be killed here
    shutil.rmtree(copy, ignore_errors=True)
    copy_tokenizer(Path(run.data.tokenizer), copy)
    os.replace(copy, target)
