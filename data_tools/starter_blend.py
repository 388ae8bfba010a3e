"""A blend to start with, written beside every finished corpus: all its datasets in the form of `configs/data/*.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

WEIGHTS = {"english": 0.70, "multilingual": 0.15, "code": 0.15}  # Nemotron-4, arXiv 2402.16819
OTHER_WEIGHT = 0.10
ALPHA = {"multilingual": 0.5}
MIN_VALIDATION_TOKENS = (
    4_097  # one window of 4,096 tokens: training refuses a held-out file that is shorter than its window
)


def data_yaml(name: str, folder: Path, datasets: dict[str, dict[str, Any]]) -> str:
    """YAML text of a blend `name` of the datasets `dataset/split` in `folder`, groups weighted as in Nemotron-4.

    A dataset whose documents are all held out has no training file and is left out; so are held-out files that are too short to read.
    """
    groups: dict[str, Any] = {}
    for dataset_split, facts in datasets.items():
        dataset, split = dataset_split.rsplit("/", 1)
        if split != "train":
            continue
        group = groups.setdefault(facts["group"], {"weight": WEIGHTS.get(facts["group"], OTHER_WEIGHT), "sources": {}})
        if facts["group"] in ALPHA:
            group["alpha"] = ALPHA[facts["group"]]
        source = {"path": str(folder / dataset)}
        if datasets.get(f"{dataset}/validation", {"tokens": 0})["tokens"] >= MIN_VALIDATION_TOKENS:
            source["validation"] = str(folder / f"{dataset}.validation")
        group["sources"][dataset] = source
    head = (
        f"# All datasets of {folder}, weighted as in Nemotron-4: `mlite train --config-dir {folder} data={name}`, or to look at it\n"
        f"# `mlite inspect --config-dir {folder} data={name}`.\n"
    )
    return head + yaml.safe_dump(
        {"tokenizer": str(folder / "tokenizer"), "groups": groups}, sort_keys=False, allow_unicode=True
    )
