"""transformers' Nemotron of the same sizes (squared ReLU, LayerNorm1P, rotary embeddings on half a head) in the plain loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import NemotronConfig, NemotronForCausalLM

from benchmarks.peers.serving import Work, train


def build(work: Work) -> torch.nn.Module:
    """The model, with torch's attention kernel and without a cache."""
    config = NemotronConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden,
        intermediate_size=work.ffn,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.heads,
        head_dim=work.hidden // work.heads,
        max_position_embeddings=work.length,
        partial_rotary_factor=0.5,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return NemotronForCausalLM(config).train()


if __name__ == "__main__":
    work = Work.from_command_line()
    model = build(work)

    def loss_of(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1), targets.flatten())

    train(model, loss_of, work, compiled=work.compiled)
