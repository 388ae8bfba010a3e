"""megatron-core's GPTModel (local layers, squared ReLU, LayerNorm, rotary embeddings on half a head) in the plain loop.

It is made for a GPU. Two replacements let it run on a CPU: where it asks for the current CUDA device, it gets the CPU; and its tracker
of CUDA random states, which only dropout needs, does nothing.
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import random
from megatron.core.transformer import TransformerConfig

from benchmarks.peers.serving import Work, train


def run_on_cpu(folder: str) -> None:
    """Put the replacements in place and make a process group of one."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    random.CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def build(work: Work) -> torch.nn.Module:
    """The model."""
    config = TransformerConfig(
        num_layers=work.layers,
        hidden_size=work.hidden,
        ffn_hidden_size=work.ffn,
        num_attention_heads=work.heads,
        activation_func=squared_relu,
        normalization="LayerNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=work.vocabulary,
        max_sequence_length=work.length,
        position_embedding_type="rope",
        rotary_percent=0.5,
    )


if __name__ == "__main__":
    work = Work.from_command_line()
    run_on_cpu(work.folder)
    model = build(work)
    positions = torch.arange(work.length).expand(work.batch, -1)
    hidden_from = torch.ones(work.length, work.length, dtype=torch.bool).triu(1)[None, None]  # True: not seen

    def loss_of(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy."""
        return model(tokens, positions, hidden_from, labels=targets).mean()

    train(model, loss_of, work, compiled=work.compiled)
