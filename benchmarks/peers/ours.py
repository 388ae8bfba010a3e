"""`mlite train` itself: data read from disk, checks, metrics.jsonl; only the batches are handed out at a pace."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from benchmarks.peers import serving
from megatron_lite.commands.train import train
from megatron_lite.data.loader import DataLoader
from megatron_lite.training.config import compose_run


def overrides(work: serving.Work) -> list[str]:
    """The command line of `mlite train` that does this work."""
    return [
        "model=nemotron4_tiny",
        f"model.num_layers={work.layers}",
        f"model.hidden_size={work.hidden}",
        f"model.vocab_size={work.vocabulary}",
        f"model.attention.heads={work.heads}",
        f"model.attention.kv_heads={work.heads}",
        f"model.attention.head_dim={work.hidden // work.heads}",
        f"model.mlp.ffn_size={work.ffn}",
        "data=random",
        f"data.random_corpus={work.folder}/random",
        f"data.seq_len={work.length}",
        f"train.global_batch_size={work.batch}",
        f"train.micro_batch_size={work.batch}",
        f"train.log_every={work.log_every}",
        f"train.threads={work.threads}",
        "train.max_steps=1000000",
        "schedule=constant",
        f"optim.lr={serving.LEARNING_RATE}",
        f"optim.clip_grad={serving.CLIP}",
        f"parallel.compile={str(work.compiled).lower()}",
        f"run.dir={work.folder}/run",
        "tracking=none",
        *work.overrides,
    ]


def main() -> None:
    """Train until standard input ends."""
    work, pace, steps = serving.Work.from_command_line(), serving.Pace(), DataLoader.steps

    def paced(*args: Any) -> Any:
        return pace.over(steps(*args))

    with patch.object(DataLoader, "steps", paced):
        train(compose_run(overrides(work)))


if __name__ == "__main__":
    main()
