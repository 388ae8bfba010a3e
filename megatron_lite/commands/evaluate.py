"""`mlite evaluate`: loss and perplexity by source on held-out data.

python -m megatron_lite evaluate checkpoint=runs/smoke
python -m megatron_lite evaluate checkpoint=some/hugging_face_folder data=mine
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_lite.commands.command import run_command
from megatron_lite.data.config import DataConfig
from megatron_lite.data.loader import validation_batches
from megatron_lite.data.source import Source, open_validation
from megatron_lite.objectives.next_token import NextToken
from megatron_lite.precision.dtypes import PrecisionConfig, call_in
from megatron_lite.runtime import default_device
from megatron_lite.training.build import check_vocabulary, open_tokenizer, prepare_data
from megatron_lite.weights import load_decoder, open_weights


@dataclass
class EvaluateConfig:
    """`mlite evaluate`: the model comes from `checkpoint`, the data from here."""

    checkpoint: str = "???"
    data: DataConfig = field(default_factory=DataConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    micro_batch_size: int = 8
    json: bool = False

    def validate(self) -> None:
        """Raise ValueError naming the key whose value cannot be."""
        if self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={self.micro_batch_size} must be at least 1")
        self.data.validate()
        self.precision.validate()


def main() -> None:
    """Parse, evaluate, exit."""
    run_command("evaluate", EvaluateConfig, "Loss and perplexity of a model on held-out data, by source.", evaluate)


def evaluate(config: EvaluateConfig) -> int:
    """Print a table (and with `json=true` one JSON line) of the loss on every held-out file of `data`.

    Raises ValueError when model, tokenizer and data do not belong together.
    """
    config.validate()
    weights = open_weights(config.checkpoint)
    if config.data.sample_corpus and not Path(config.data.tokenizer).exists():
        if weights.manifest is None:
            raise ValueError(
                f"data=sample is not built yet, and {config.checkpoint} was not trained on it; give data=<a group of your own>, "
                "or build it with `make smoke`"
            )
        prepare_data(config.data, vocab_size=weights.config.vocab_size, report=print)
    tokenizer = open_tokenizer(config.data)
    check_vocabulary(weights.config, tokenizer)
    trained_with = weights.tokenizer_fingerprint
    if trained_with not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"{config.checkpoint} was trained with tokenizer {trained_with}, but data.tokenizer={config.data.tokenizer} is "
            f"{tokenizer.fingerprint}: losses would mean nothing; tokenize the data with the model's tokenizer"
        )
    held_out = open_validation(config.data, tokenizer)
    if not held_out:
        raise ValueError("data: no source has a `validation` file; name one for at least one source")
    device = default_device()
    objective = NextToken(load_decoder(weights, device=device))
    losses = {name: _loss(objective, source, config, device) for name, source in held_out.items()}
    _print(losses, str(weights.path), as_json=config.json)
    return 0


@torch.no_grad()
def _loss(objective: NextToken, source: Source, config: EvaluateConfig, device: torch.device) -> float:
    """Mean loss in nats over the counted tokens of the held-out windows."""
    total, tokens = 0.0, 0
    windows = min(config.data.validation.windows, source.num_windows)
    size = min(config.micro_batch_size, windows)  # the last batch is filled up with blank windows
    for batch in validation_batches(source, windows=windows, micro_batch_size=size):
        on_device = {key: value.to(device) for key, value in batch.items()}
        loss, counted = call_in(config.precision.dtype, objective, on_device)
        total, tokens = total + float(loss), tokens + int(counted)
    return total / max(tokens, 1)


def _print(losses: dict[str, float], model: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"checkpoint": model, "val_loss": losses}))
        return
    table = Table(title=model)
    for column in ("source", "loss", "perplexity"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for source, loss in losses.items():
        table.add_row(source, f"{loss:.4f}", f"{math.exp(min(loss, 700.0)):.2f}")
    Console().print(table)
