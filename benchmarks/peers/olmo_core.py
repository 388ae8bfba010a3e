"""OLMo-core's Trainer with its own loop, metrics and console log, torch's fused AdamW, and one random batch again and again.

Its feed-forward is a SwiGLU, of two thirds of the width: as many FLOPs and parameters as squared ReLU at the full one. It norms by RMS
and rotates whole heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from olmo_core.data import DataLoaderBase
from olmo_core.nn.feed_forward import FeedForwardConfig
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import AdamWConfig
from olmo_core.train import Duration, TrainerConfig, prepare_training_environment
from olmo_core.train.train_module import TransformerTrainModuleConfig

from benchmarks.peers.serving import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY, Pace, Work


class Batches(DataLoaderBase):
    """One batch, again and again."""

    def __init__(self, work: Work, pace: Pace) -> None:
        super().__init__(work_dir=work.folder, global_batch_size=work.batch * work.length)
        self.pace, self.tokens = pace, work.tokens()[0]

    @property
    def total_batches(self) -> None:
        """Without end."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""

    def reshuffle(self, epoch: int | None = None, **_: Any) -> None:
        """Nothing to shuffle."""
        self._epoch = epoch

    def get_mock_batch(self) -> dict[str, Any]:
        """For the trainer's try before it starts."""
        return {"input_ids": self.tokens}

    def global_num_tokens_in_batch(self, batch: dict[str, Any]) -> int:
        """Tokens of a step."""
        return self.tokens.numel()

    def _iter_batches(self) -> Iterator[dict[str, Any]]:
        return self.pace.over({"input_ids": self.tokens} for _ in itertools.count())


def main() -> None:
    """Train until standard input ends."""
    work, pace = Work.from_command_line(), Pace()
    prepare_training_environment(backend=None, seed=0)
    model = TransformerConfig.llama_like(
        d_model=work.hidden,
        vocab_size=work.vocabulary,
        n_layers=work.layers,
        n_heads=work.heads,
        rope_theta=10_000,
        feed_forward=FeedForwardConfig(hidden_size=round(work.ffn * 2 / 3 / 8) * 8, bias=False),
    ).build(init_device="cpu")
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=work.batch * work.length,
        max_sequence_length=work.length,
        optim=AdamWConfig(lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True),
        max_grad_norm=CLIP,
        compile_model=work.compiled,
    ).build(model)
    trainer = TrainerConfig(
        save_folder=f"{work.folder}/run",
        max_duration=Duration.steps(1_000_000),
        metrics_collect_interval=work.log_every,
        no_checkpoints=True,
        no_evals=True,
    ).build(module, Batches(work, pace))
    trainer.fit()


if __name__ == "__main__":
    main()
