"""A blend to start with, written with every finished corpus: all its datasets in the form of `configs/data/*.yaml`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

WEIGHTS = {"english": 0.70, "multilingual": 0.15, "code": 0.15}  # Nemotron-4, arXiv 2402.16819
OTHER_WEIGHT = 0.10
ALPHA = {"multilingual": 0.5}
# One window of 4,096 tokens: training refuses a held-out file that is shorter than its window.
MIN_VALIDATION_TOKENS = 4_097


def data_yaml(name: str, datasets: dict[str, dict[str, Any]]) -> str:
    """YAML text of a blend `name` of the datasets `dataset/split`, groups weighted as in Nemotron-4.

    Paths are relative to the folder that is given as `--config-dir`, so a corpus can be moved. Datasets without a training file and
    held-out files that are too short to read are left out; a comment names them.
    """
    groups: dict[str, Any] = {}
    for dataset_split, facts in datasets.items():
        dataset, split = dataset_split.rsplit("/", 1)
        if split != "train":
            continue
        group = groups.setdefault(facts["group"], {"weight": WEIGHTS.get(facts["group"], OTHER_WEIGHT), "sources": {}})
        if facts["group"] in ALPHA:
            group["alpha"] = ALPHA[facts["group"]]
        source = {"path": f"${{data.folder}}/{dataset}"}
        if _held_out_tokens(dataset, datasets) >= MIN_VALIDATION_TOKENS:
            source["validation"] = f"${{data.folder}}/{dataset}.validation"
        group["sources"][dataset] = source
    head = [
        "# All datasets of this corpus, weighted as in Nemotron-4. To look at it, or to train on it:",
        f"#   mlite inspect --config-dir <this corpus> data={name}",
        f"#   mlite train --config-dir <this corpus> data={name}",
        *(f"# {line}" for line in left_out(datasets)),
        "folder: ${config_dir:}  # the folder given as --config-dir; in a copy elsewhere, write the path of the corpus",
    ]
    rest = {"tokenizer": "${data.folder}/tokenizer", "groups": groups}
    return "\n".join(head) + "\n" + yaml.safe_dump(rest, sort_keys=False, allow_unicode=True)


def left_out(datasets: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One line for every dataset of which the blend leaves out the training or the validation file."""
    for dataset in sorted({name.rsplit("/", 1)[0] for name in datasets}):
        held_out = _held_out_tokens(dataset, datasets)
        if f"{dataset}/train" not in datasets:
            yield f"{dataset}: all its documents are held out for validation, so the blend leaves it out"
        elif not held_out:
            yield f"{dataset}: no document was held out, so it has no validation; raise data_recipe.tokenize.held_out"
        elif held_out < MIN_VALIDATION_TOKENS:
            yield (
                f"{dataset}: {held_out:,} held-out tokens are less than a window of {MIN_VALIDATION_TOKENS - 1:,} + 1, so the blend "
                f"leaves them out; raise data_recipe.tokenize.held_out, or for data.seq_len < {held_out} add "
                f"validation: ${{data.folder}}/{dataset}.validation"
            )


def _held_out_tokens(dataset: str, datasets: dict[str, dict[str, Any]]) -> int:
    return int(datasets.get(f"{dataset}/validation", {"tokens": 0})["tokens"])
