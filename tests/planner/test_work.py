"""What one rank runs, against counts by hand: products and attention, collectives, what recomputation and compilation change."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from megatron_lite.models.flops import parameter_count
from megatron_lite.models.pattern import LayerSpec
from megatron_lite.models.scan import Operands
from megatron_lite.models.ssd import ssd
from megatron_lite.planner import meta
from megatron_lite.planner.job import Job
from megatron_lite.planner.operators import ROUNDS, Exchange, Kernel, Recorder, record
from megatron_lite.planner.work import Unit, seen_fraction, units_of
from megatron_lite.precision.dtypes import PrecisionConfig
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


def of_scans(planned: Job) -> list[Kernel]:
    """What the scan of the first layer with one runs."""
    steps = (step for unit in units_of(planned) for step in unit.steps)
    return [step for step in steps if isinstance(step, Kernel) and step.of_scan]


def test_marks_around_scans_change_no_count(monkeypatch):
    planned = job("model=nano2_tiny", "parallel.recompute=full", "parallel.cp=2", gpus=2)
    marked = [step for unit in units_of(planned) for step in unit.steps]
    monkeypatch.setattr(meta, "plan_scans", lambda *_, **__: None)
    unmarked = [step for unit in units_of(planned) for step in unit.steps]
    without_marks = [replace(step, of_scan=False) if isinstance(step, Kernel) else step for step in marked]
    assert Counter(without_marks) == Counter(unmarked)  # backward takes the order in which it hears of gradients
    assert any(isinstance(step, Kernel) and step.of_scan for step in marked)


def test_what_is_marked_is_the_scan():
    """Against the same scan by itself."""
    planned = job("model=nano2_tiny")
    mamba = planned.model.mamba

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return meta.meta_tensor(*shape, dtype=dtype, grad=True)

    dt, A = tensor(2, 64, mamba.heads, dtype=torch.float32), tensor(mamba.heads, dtype=torch.float32)
    groups = (tensor(2, 64, mamba.groups, mamba.state) for _ in range(2))
    operands = Operands(tensor(2, 64, mamba.heads, mamba.head_dim), dt, A, *groups)
    alone, _ = record(Recorder(), lambda: ssd(operands)[0])
    layers = planned.model.symbols.count("M")
    for what in ("flops", "bytes"):
        by_itself = sum(getattr(step, what) for step in (*alone.forward, *alone.backward))
        assert sum(getattr(step, what) for step in of_scans(planned)) == pytest.approx(layers * by_itself, rel=0.02)


def test_the_kernel_of_mamba_2_by_hand():
    planned = replace(job("model=nano2_tiny", "data.seq_len=128"), scan_kernels=True)
    mamba, layers, tokens = planned.model.mamba, planned.model.symbols.count("M"), 2 * 128
    N, P = mamba.state, mamba.head_dim
    # N x P: states, what outputs read of them; states again, their gradients, what those of q, k and v read
    # scores of 64 tokens: from q and k, times v; those of outputs, times k and q; from q and k again, times gradients
    products = 2 * tokens * mamba.heads * (7 * N * P + 64 * (4 * N + 3 * P))
    kernels = of_scans(planned)
    assert sum(step.flops for step in kernels) == layers * products
    assert {step.dtype for step in kernels if step.flops} == {"bf16"}
    plain = sum(step.bytes for step in of_scans(replace(planned, scan_kernels=False)))
    assert sum(step.bytes for step in kernels) < plain / 4
    in_fp32 = replace(planned, precision=PrecisionConfig("fp32"))
    assert all(step.kind != "scan" for step in of_scans(in_fp32))  # of which the kernel would keep 10 bits


def test_the_kernel_of_mamba_1_by_hand():
    planned = replace(job("model=hymba_tiny", "data.seq_len=128"), scan_kernels=True)
    mamba, layers, tokens = planned.model.mamba, planned.model.symbols.count("H"), 2 * (128 + planned.model.meta_tokens)
    channels = mamba.heads * mamba.head_dim
    launched = [s for s in of_scans(planned) if s.flops]
    numbers = tokens * channels * mamba.state
    assert [s.flops for s in launched] == layers * [23.0 * numbers, 37.0 * numbers]  # with an exponential, 16 each
    # x, dt and y; those, their gradients and that of y; B and C, A, what is kept for every 2,048 tokens
    of_channels = (3 + 5) * tokens * channels * 4
    assert sum(s.bytes for s in launched) == pytest.approx(layers * of_channels, rel=0.5)
    masked = replace(planned, masked=True)
    assert all(s.kind != "scan" for s in of_scans(masked))  # the kernel takes one document
    assert sum(s.bytes for s in of_scans(masked)) > 10 * sum(s.bytes for s in launched)


def sent(unit: Unit, ranks: int) -> dict[str, list[float]]:
    """Operation -> bytes that a rank sends in each collective of its group."""
    found: dict[str, list[float]] = {}
    for step in unit.steps:
        if isinstance(step, Exchange) and step.axis == "cp":
            found.setdefault(step.operation, []).append(step.size * (ranks - 1) / ranks)
    return found


def test_layers_that_share_keys_are_sent_a_window_once():
    divided = job("model=hymba_tiny", "model.attention.window=5", "parallel.cp=4", gpus=4)
    _, _, _, first, _, second, *_ = units_of(divided)  # `embedding`, then `H-H-H-H-` whose middle two share
    model = divided.model
    # The ends of 8 slices: nobody reads the last, and rank 3 itself that of slice 3.
    numbers = 2 * (5 * 6 / 4) * model.attention.kv_heads * (model.head_dim + model.value_head_dim)
    exchanged = sent(first, 4)
    assert (exchanged["context_window"], exchanged["context_window_backward"]) == ([2 * numbers], [4 * numbers])
    assert not {ROUNDS, "context_window"} & sent(second, 4).keys()


def test_states_go_to_every_other_rank():
    divided = job("model=nano2_tiny", "parallel.cp=4", gpus=4)
    mamba = divided.model.mamba
    state = 2 * 2 * mamba.heads * mamba.head_dim * mamba.state * 4  # both slices of both rows, in fp32
    of_layer = sent(units_of(divided)[1], 4)
    assert of_layer["context_pass_states"] == [3 * (state + 2 * 2 * mamba.heads * 4)]
    assert of_layer["context_pass_gradients"] == [3 * state]
