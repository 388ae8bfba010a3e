"""What one rank runs, against counts by hand: products and attention, collectives, what recomputation and compilation change."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from megatron_lite.models.flops import parameter_count
from megatron_lite.models.pattern import LayerSpec
from megatron_lite.planner.job import Job
from megatron_lite.planner.operators import ROUNDS, Exchange, Kernel
from megatron_lite.planner.work import seen_fraction, units_of
from megatron_lite.training.config import compose_run
from megatron_lite.training.planning import job_of

BF16 = [
    "precision=bf16",
    "data.reset_attention=false",
    "data.seq_len=64",
    "train.micro_batch_size=2",
    "train.max_steps=1",
]


def job(*words: str, gpus: int = 1) -> Job:
    return job_of(compose_run([*BF16, *words]), gpus)


def flops(planned: Job) -> Counter[str]:
    """Kind and dtype -> FLOPs of a micro-batch."""
    counts: Counter[str] = Counter()
    for unit in units_of(planned):
        for step in unit.steps:
            if isinstance(step, Kernel):
                counts[f"{step.kind} {step.dtype}"] += step.flops
    return counts


def moved(planned: Job) -> float:
    return sum(
        s.bytes for unit in units_of(planned) for s in unit.steps if isinstance(s, Kernel) and s.kind == "memory"
    )


def test_products_and_attention_of_a_transformer_by_hand():
    planned = job("model=nemotron4_tiny")
    model, tokens = planned.model, 2 * 64
    norms = (2 * len(model.symbols) + 2) * model.hidden_size  # gain and bias
    padded = (model.padded_vocab - model.vocab_size) * model.hidden_size
    matrices = parameter_count(model) - norms - model.vocab_size * model.hidden_size + padded
    counts = flops(planned)
    assert counts["matmul bf16"] == 6 * matrices * tokens
    pairs = 64 * 65 / 2
    products = 2 + 5  # forward; backward computes the scores again
    attention = 2 * products * 2 * model.attention.heads * pairs * model.head_dim * model.symbols.count("*")
    assert counts["attention bf16"] == pytest.approx(attention)
    assert counts["matmul fp32"] == 0


def test_tensor_parallel_ranks_share_the_products():
    whole = flops(job("model=nemotron4_tiny"))
    shared = flops(job("model=nemotron4_tiny", "parallel.tp=2", "parallel.sequence_parallel=true", gpus=2))
    assert {kind: 2 * count for kind, count in shared.items()} == pytest.approx(dict(whole))


def test_recomputation_runs_what_it_says_again():
    none, selective, full = (
        job("model=nemotron4_tiny", f"parallel.recompute={mode}") for mode in ("none", "selective", "full")
    )
    assert flops(selective) == flops(none)
    assert moved(selective) > 1.05 * moved(none)
    head = 6 * none.model.padded_vocab * none.model.hidden_size * 2 * 64
    layers = flops(none)["matmul bf16"] - head
    # the last product of a layer is not needed again: backward of its block asks for what came before it
    assert layers < flops(full)["matmul bf16"] - head <= layers * 4 / 3
    assert flops(full)["attention bf16"] == pytest.approx(flops(none)["attention bf16"] * 9 / 7)


def test_compilation_moves_fewer_bytes_and_multiplies_as_much():
    eager, compiled = job("model=nemotron4_tiny"), job("model=nemotron4_tiny", "parallel.compile=true")
    assert flops(eager) == flops(compiled)
    assert moved(compiled) < 0.9 * moved(eager)


def test_fp8_products_are_those_of_the_recipe():
    planned = job("model=nemotron4_tiny", "precision=fp8_current", "precision.bf16_last_layers=1")
    counts, bf16 = flops(planned), flops(job("model=nemotron4_tiny"))
    assert counts["matmul bf16"] + counts["matmul fp8"] == bf16["matmul bf16"]
    again = flops(job("model=nemotron4_tiny", "precision=fp8_current", "parallel.recompute=selective"))
    everything = flops(job("model=nemotron4_tiny", "precision=fp8_current"))
    assert again["matmul fp8"] > everything["matmul fp8"]  # its kernels are no operators whose output could be kept
    last = 6 * 2 * planned.model.hidden_size * planned.model.mlp.ffn_size * 2 * 64
    head = 6 * planned.model.padded_vocab * planned.model.hidden_size * 2 * 64
    assert counts["matmul bf16"] == last + head


@pytest.mark.parametrize("model", ["nano2_tiny", "hymba_tiny", "qwen3_0p6b"])
def test_every_layer_type_is_traced(model):
    """Tied heads, shared keys, windows, scans: products take at least the FLOPs of the parameters that they use."""
    planned = job(f"model={model}")
    units = units_of(planned)
    assert [unit.name for unit in units[1:-1]] == [f"layers.{index}" for index in range(len(planned.model.symbols))]
    assert all(any(s.kind == "matmul" for s in unit.steps if isinstance(s, Kernel)) for unit in units[1:])
    assert sum(unit.numbers for unit in units) == parameter_count(
        replace(planned.model, vocab_size=planned.model.padded_vocab)
    )


def test_collectives_of_sequence_parallel_layers():
    planned = job("model=nemotron4_tiny", "parallel.tp=2", "parallel.sequence_parallel=true", gpus=2)
    layer = units_of(planned)[1]
    stream = 2 * 64 * planned.model.hidden_size * 2  # bytes of B T D in bf16
    large = [(s.operation, s.size) for s in layer.steps if isinstance(s, Exchange) and s.size >= stream]
    gather, scatter = ("all_gather_into_tensor", stream), ("reduce_scatter_tensor", stream)
    assert large == [gather, scatter, gather, scatter]


def test_seen_pairs_are_those_of_a_mask():
    for window, first, tokens in ((None, 0, 7), (2, 0, 7), (2, 1, 9), (20, 0, 7)):
        seen = sum(
            key <= query and (window is None or query - key <= window or key < first)
            for query in range(tokens)
            for key in range(tokens)
        )
        assert seen_fraction(LayerSpec("*", window=window), tokens, first) * tokens**2 == pytest.approx(seen)


def test_ranks_that_divide_a_sequence_share_attention_and_send_what_is_seen():
    whole, divided = job("model=nemotron4_tiny"), job("model=nemotron4_tiny", "parallel.cp=2", gpus=2)
    assert {kind: 2 * count for kind, count in flops(divided).items()} == pytest.approx(dict(flops(whole)))
    core = units_of(divided)[1]
    model = divided.model
    numbers = 2 * 32 * model.attention.kv_heads * 2 * model.head_dim  # keys and values of this rank
    sent = [step.size / 2 for step in core.steps if isinstance(step, Exchange) and step.operation == ROUNDS]
    # three quarters of them in bf16, and in backward again with their gradients in fp32
    assert sent == [0.75 * 2 * numbers, 0.75 * (2 + 4) * numbers]


def test_layers_that_share_keys_are_sent_a_window_once():
    divided = job("model=hymba_tiny", "parallel.cp=2", gpus=2)
    first, second = (
        {step.operation for step in unit.steps if isinstance(step, Exchange)} & {ROUNDS, "context_window"}
        for unit in units_of(divided)[3:7:2]  # `embedding`, then `H-H-H-H-` whose middle two share
    )
    assert (first, second) == ({"context_window"}, set())
