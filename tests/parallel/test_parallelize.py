"""Tensor- and sequence-parallel decoders against the plain one: initial weights, loss and every gradient."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.engine.fsdp import FsdpConfig
from megatron_lite.models.config import AttentionConfig, MambaConfig, MlpConfig, ModelConfig, RopeConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.initialization import initialize_model_
from megatron_lite.objectives.next_token import NextToken
from megatron_lite.parallel.assemble import Materialize, assemble, bare, seeded
from megatron_lite.parallel.collectives import sequence_gather
from megatron_lite.parallel.cross_entropy import cross_entropy_sum
from megatron_lite.parallel.layers import (
    CopyInside,
    InnerRowParallelLinear,
    PrefixedVocabParallelEmbedding,
    ShardInfo,
    TensorParallel,
    shard_info,
)
from megatron_lite.parallel.mesh import CPU, Mesh, ParallelConfig, build_mesh
from megatron_lite.parallel.norms import ShardedNorm
from megatron_lite.parallel.parallelize import Recipe, parallelize, vocabulary_shard
from tests.distributed import run_ranks

SEED = 5
# Every gradient within this much of its largest entry: reordered fp32 sums differ by at most 2e-6 here (AVX-512, AVX2
# or SSE), bugs by 1e-1.
TOLERANCE = 1e-5

NEMOTRON = ModelConfig(
    family="nemotron4",
    num_layers=2,
    hidden_size=32,
    attention=AttentionConfig(heads=8, kv_heads=4),
    mlp=MlpConfig(ffn_size=48),
    vocab_size=250,
    max_seq_len=16,
    rope=RopeConfig(fraction=0.5),
    init_std=0.2,
)
LLAMA = replace(
    NEMOTRON,
    family="llama",
    mlp=MlpConfig(ffn_size=48, activation="swiglu"),
    norm="rmsnorm",
    tie_embeddings=True,
)
BIASED = replace(NEMOTRON, linear_bias=True, norm="layernorm", tie_embeddings=True)
HYBRID = replace(
    NEMOTRON,
    family="nemotron_h",
    num_layers=None,
    pattern="M-*M",
    norm="rmsnorm",
    rope=RopeConfig(fraction=0.0),
    mamba=MambaConfig(heads=8, head_dim=6, groups=4, state=5),
)
# Biases on queries, keys and values and norms on the heads: Qwen2's and Qwen3's in one.
QWEN = replace(LLAMA, attention=AttentionConfig(heads=8, kv_heads=4, qkv_bias=True, qk_norm=True))
HYMBA = replace(
    LLAMA,
    family="hymba",
    num_layers=None,
    pattern="H-*H",
    meta_tokens=4,
    attention=AttentionConfig(
        heads=8, kv_heads=4, value_head_dim=6, window=5, always_visible=4, global_layers=[1], kv_groups=[[0, 2]]
    ),
    mamba=MambaConfig(version=1, heads=8, head_dim=6, state=5, dt_rank=3),
)
MODELS = {"nemotron": NEMOTRON, "llama": LLAMA, "biased": BIASED, "qwen": QWEN, "hybrid": HYBRID, "hymba": HYMBA}


@dataclass
class Result:
    """One rank's view of one forward and backward."""

    loss: Tensor
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    infos: dict[str, ShardInfo]
    logits: Tensor


def batch(config: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, config.vocab_size, (3, 17), generator=generator)
    documents = torch.tensor([[0] * 5 + [1] * 11, [0] * 16, [0] * 2 + [1] * 7 + [2] * 7])
    mask = torch.rand(3, 16, generator=generator) > torch.tensor([[0.1], [0.5], [0.9]])  # uneven
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": mask, "documents": documents}


def perturb_(decoder: Decoder, infos: dict[str, ShardInfo]) -> None:
    """Move gains and biases off their constant start, by the same global values on every layout."""
    for name, parameter in decoder.named_parameters():
        info = infos[name]
        if len(info.global_shape) == 1:
            noise = torch.randn(info.global_shape, generator=torch.Generator().manual_seed(len(name))) * 0.3
            with torch.no_grad():
                parameter += noise.narrow(0, info.start, parameter.shape[0])


def forward_backward(decoder: Decoder) -> Result:
    data = batch(decoder.config)
    infos = shard_info(decoder)
    weights = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    perturb_(decoder, infos)
    loss = cross_entropy_sum(
        decoder.hidden(data["tokens"], data["documents"]).flatten(0, 1),
        decoder.head_weight,
        data["targets"].flatten(),
        data["loss_mask"].flatten(),
        shard=vocabulary_shard(decoder),
    )
    (loss / data["loss_mask"].sum()).backward()
    gradients = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    with torch.no_grad():
        logits = decoder(data["tokens"], data["documents"])
    return Result(loss.detach(), weights, gradients, infos, logits)


def as_plain(result: Result) -> tuple[object, ...]:
    """A test's own class does not travel between processes."""
    return result.loss, result.weights, result.gradients, result.infos, result.logits


def single(config: ModelConfig) -> Result:
    decoder = Decoder(config)
    initialize_model_(decoder, SEED)
    return forward_backward(decoder)


def build(world_size: int, config: ModelConfig, parallel: ParallelConfig) -> Decoder:
    """Assembled in memory full of NaN."""
    mesh = build_mesh(parallel.degrees(world_size), device=CPU)
    torch.use_deterministic_algorithms(True)  # fills what `torch.empty` returns with NaN
    try:
        assert torch.empty(3).isnan().all()
        decoder, _ = assemble(config, mesh=mesh, recipe=Recipe(parallel), fill=seeded(SEED), wrap=bare)
    finally:
        torch.use_deterministic_algorithms(False)
    return decoder


def sharded(rank: int, world_size: int, config: ModelConfig, parallel: ParallelConfig, bug: str) -> tuple[object, ...]:
    decoder = build(world_size, config, parallel)
    with pytest.MonkeyPatch.context() as patch:
        plant(bug, patch)
        return as_plain(forward_backward(decoder))


def plant(bug: str, patch: pytest.MonkeyPatch) -> None:
    """Break one thing that the comparison must notice."""
    if bug == "norm gradients not reduced":
        patch.setattr(TensorParallel, "on_stream", lambda self, parameter: parameter)
    elif bug == "copy_in without its sum":
        patch.setattr(TensorParallel, "enter", lambda self, x: x)
    elif bug == "gradient summed twice":
        enter = TensorParallel.enter
        patch.setattr(TensorParallel, "enter", lambda self, x: enter(self, enter(self, x)))
    elif bug == "row without its sum":
        patch.setattr(TensorParallel, "leave", lambda self, y: y)
    elif bug == "head norm gradients not summed":
        patch.setattr(TensorParallel, "on_heads", lambda self, parameter: parameter)
    elif bug == "meta tokens on one rank only":
        patch.setattr(PrefixedVocabParallelEmbedding, "prefix", prefix_of_one_rank)
    elif bug == "branch norm over the local part only":
        patch.setattr(ShardedNorm, "forward", norm_of_a_part)
    elif bug == "inner row without its sum":
        patch.setattr(InnerRowParallelLinear, "forward", lambda self, x: F.linear(x, self.weight))
    elif bug == "inner copy without its sum":
        patch.setattr(CopyInside, "forward", lambda self, *args: super(CopyInside, self).forward(*args))
    else:
        assert bug == "", bug


def prefix_of_one_rank(self: PrefixedVocabParallelEmbedding) -> Tensor:
    return self.meta_tokens if self.tp.rank == 0 else self.meta_tokens * 0.0


def norm_of_a_part(self: ShardedNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def joined(results: list[Result], name: str, field: str) -> Tensor:
    """The global tensor from the ranks' parts."""
    parts = [getattr(result, field)[name] for result in results]
    dim = results[0].infos[name].tp_dim
    return parts[0] if dim is None else torch.cat(parts, dim)


def errors(results: list[Result], expected: Result) -> dict[str, float]:
    """Relative error of the loss and of every global gradient; infinite where replicated ones differ between ranks."""
    found = {"loss": abs(results[0].loss - expected.loss).item() / abs(expected.loss).item()}
    for name, gradient in expected.gradients.items():
        difference = (joined(results, name, "gradients") - gradient).abs().max() / gradient.abs().max()
        found[name] = difference.item()
        if results[0].infos[name].tp_dim is None and any(
            not torch.equal(result.gradients[name], results[0].gradients[name]) for result in results
        ):
            found[name] = float("inf")
    return found


CASES = list(itertools.product(MODELS, [2, 4], [False, True]))


@pytest.mark.parametrize(("model", "tp", "sequence_parallel"), CASES)
def test_same_weights_loss_and_gradients(model: str, tp: int, sequence_parallel: bool) -> None:
    config = MODELS[model]
    parallel = ParallelConfig(tp=tp, sequence_parallel=sequence_parallel)
    results = [Result(*r) for r in run_ranks(tp, sharded, config, parallel, "")]
    expected = single(config)
    assert set(results[0].gradients) == set(expected.gradients) == set(expected.weights)
    for name, weight in expected.weights.items():
        assert results[0].infos[name].global_shape == weight.shape
        assert torch.equal(joined(results, name, "weights"), weight), name
    found = errors(results, expected)
    assert max(found.values()) < TOLERANCE, found
    for result in results:
        assert torch.equal(result.loss, results[0].loss)
        # logits of size 1: the same sums in another order
        torch.testing.assert_close(result.logits, expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("bug", "sequence_parallel"),
    [
        ("norm gradients not reduced", True),
        ("copy_in without its sum", False),
        ("gradient summed twice", False),
        ("row without its sum", False),
    ],
)
def test_planted_bugs_are_caught(bug: str, sequence_parallel: bool) -> None:
    parallel = ParallelConfig(tp=2, sequence_parallel=sequence_parallel)
    results = [Result(*r) for r in run_ranks(2, sharded, NEMOTRON, parallel, bug)]
    found = errors(results, single(NEMOTRON))
    assert max(found.values()) > 1e3 * TOLERANCE


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_only_head_norms_notice_their_unsummed_gradients(sequence_parallel: bool) -> None:
    parallel = ParallelConfig(tp=2, sequence_parallel=sequence_parallel)
    results = [Result(*r) for r in run_ranks(2, sharded, QWEN, parallel, "head norm gradients not summed")]
    wrong = {name for name, error in errors(results, single(QWEN)).items() if error > TOLERANCE}
    assert wrong == {name for name in results[0].weights if "q_norm" in name or "k_norm" in name}


def test_only_norms_notice_the_unreduced_norm_gradients() -> None:
    parallel = ParallelConfig(tp=2, sequence_parallel=True)
    results = [Result(*r) for r in run_ranks(2, sharded, NEMOTRON, parallel, "norm gradients not reduced")]
    wrong = {name for name, error in errors(results, single(NEMOTRON)).items() if error > TOLERANCE}
    assert wrong == {name for name in results[0].weights if "norm" in name}


@pytest.mark.parametrize(
    "bug",
    [
        "meta tokens on one rank only",
        "branch norm over the local part only",
        "inner row without its sum",
        "inner copy without its sum",
    ],
)
def test_planted_bugs_in_parallel_heads_are_caught(bug: str) -> None:
    parallel = ParallelConfig(tp=2, sequence_parallel=True)
    results = [Result(*r) for r in run_ranks(2, sharded, HYMBA, parallel, bug)]
    wrong = {name for name, error in errors(results, single(HYMBA)).items() if error > 100 * TOLERANCE}
    assert wrong == {"embedding.meta_tokens"} if "meta" in bug else wrong


def test_what_is_cut_where() -> None:
    infos = Result(*run_ranks(2, sharded, BIASED, ParallelConfig(tp=2), "")[1]).infos
    assert infos["embedding.weight"] == ShardInfo((256, 32), tp_dim=0, start=128, kind="embedding")
    assert infos["layers.0.mixer.qkv.weight"] == ShardInfo((64, 32), tp_dim=0, start=32)
    assert infos["layers.0.mixer.qkv.bias"] == ShardInfo((64,), tp_dim=0, start=32, kind="bias")
    assert infos["layers.0.mixer.out.weight"] == ShardInfo((32, 32), tp_dim=1, start=16)
    assert infos["layers.0.mixer.out.bias"] == ShardInfo((32,), kind="bias")
    assert infos["layers.1.norm.weight"] == ShardInfo((32,), kind="norm")
    assert infos["layers.1.mixer.down.weight"] == ShardInfo((32, 48), tp_dim=1, start=24)


class LargeCopies(TorchDispatchMode):
    """Counts copies of at least `elements`, by operator."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.seen = elements, Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() >= self.elements and "c10d" in str(func):
            self.seen["collective"] += 1
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default) and result.numel() >= self.elements:
            self.seen["copy"] += 1
        return result


WIDE = replace(NEMOTRON, hidden_size=64, attention=AttentionConfig(heads=8, kv_heads=4, head_dim=4))


def copies(
    rank: int, world_size: int, config: ModelConfig, parallel: ParallelConfig
) -> tuple[Counter[str], Counter[str]]:
    """Of whole gathered sequences: within the layers, forward and backward; and in one gather along the sequence."""
    decoder = build(world_size, config, parallel)
    data = batch(config)
    context = decoder.context(data["tokens"], data["documents"])
    stream = torch.randn(3, 16 // world_size, config.hidden_size, requires_grad=True)
    with LargeCopies(3 * 16 * config.hidden_size) as watch:
        x = stream
        for layer in decoder.layers:
            x, _ = layer(x, context)
        x.sum().backward()
    with LargeCopies(watch.elements) as along_the_sequence:
        sequence_gather(stream, dist.group.WORLD, dim=1)
    return watch.seen, along_the_sequence.seen


def test_sequence_parallel_layers_copy_nothing_around_their_collectives() -> None:
    """Four layers gather once in forward and once in backward; their slices are used as they arrive."""
    for seen, along_the_sequence in run_ranks(2, copies, WIDE, ParallelConfig(tp=2, sequence_parallel=True)):
        assert seen["collective"] >= 8
        assert seen["copy"] == 0
        assert along_the_sequence["copy"] == 1


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("config", [LLAMA, HYBRID, HYMBA], ids=["llama", "hybrid", "hymba"])
def test_recompute_gives_the_same_bits(config: ModelConfig, mode: str, world_size: int) -> None:
    plain = ParallelConfig(tp=world_size, sequence_parallel=world_size > 1)
    again = replace(plain, recompute=mode)
    if world_size == 1:
        pairs = [tuple(forward_backward(build(1, config, parallel)) for parallel in (plain, again))]
    else:
        pairs = [
            (Result(*a), Result(*b))
            for a, b in zip(*(run_ranks(2, sharded, config, parallel, "") for parallel in (plain, again)))
        ]
    for without, with_recompute in pairs:
        assert torch.equal(without.loss, with_recompute.loss)
        for name, gradient in without.gradients.items():
            assert torch.equal(gradient, with_recompute.gradients[name]), name


def compiled(rank: int, world_size: int, config: ModelConfig, parallel: ParallelConfig) -> tuple[object, ...]:
    """Every layer traced as one graph (collectives, recompute and all), run by PyTorch's own kernels."""
    torch._dynamo.reset()  # what other tests compiled counts towards the limit of this process
    decoder = build(world_size, config, parallel)
    for layer in decoder.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    return as_plain(forward_backward(decoder))


@pytest.mark.parametrize(
    "config",
    [
        replace(NEMOTRON, num_layers=1),
        pytest.param(replace(HYBRID, pattern="M"), marks=pytest.mark.slow),
        pytest.param(
            replace(HYMBA, pattern="HH", attention=replace(HYMBA.attention, global_layers=[], kv_groups=[[0, 1]])),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["*-", "M", "HH"],
)
def test_layers_compile_without_a_break(config: ModelConfig) -> None:
    """One layer of each type: a second one takes as many seconds and shows nothing more."""
    parallel = ParallelConfig(tp=2, sequence_parallel=True, recompute="full")
    results = [Result(*r) for r in run_ranks(2, compiled, config, parallel)]
    found = errors(results, single(config))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize(
    ("version", "config", "refused"), [("2.12.1", HYBRID, True), ("2.13.0", HYBRID, False), ("2.11.0", NEMOTRON, False)]
)
def test_a_compiler_with_wrong_gradients_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str, config: ModelConfig, refused: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    with torch.device("meta"):
        decoder = Decoder(config)
    with pytest.raises(ValueError, match=r"parallel\.compile=true") if refused else nullcontext():
        parallelize(decoder, Mesh(), Recipe(ParallelConfig(compile=True)))


def test_compile_is_handed_to_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_layers: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled_layers.append(self))
    decoder = Decoder(NEMOTRON)
    parallelize(decoder, Mesh(), Recipe(ParallelConfig(compile=True)))
    assert compiled_layers == list(decoder.layers)


@pytest.mark.parametrize(
    ("change", "tp", "sequence_parallel", "message"),
    [
        (
            {"attention": AttentionConfig(heads=8, kv_heads=2)},
            4,
            False,
            r"model.attention.kv_heads=2 .*=4.*parallel.tp=1 or 2 ",
        ),
        (
            {"mlp": MlpConfig(ffn_size=50)},
            4,
            False,
            r"model.mlp.ffn_size=50 does not divide by parallel.tp=4.*parallel.tp=1 or 2 would",
        ),
        ({"vocab_multiple": 1}, 4, False, r"padded vocabulary .*=250 does not divide.*parallel.tp=1 or 2 would work"),
        ({}, 3, False, r"model.attention.kv_heads=4 do not divide by parallel.tp=3.*parallel.tp=1 would work"),
        ({"max_seq_len": 18}, 4, True, r"model.max_seq_len=18 does not divide by parallel.tp=4"),
        ({"meta_tokens": 3}, 2, True, r"model.meta_tokens \+ model.max_seq_len=19 does not divide by parallel.tp=2"),
        (
            {"attention": AttentionConfig(heads=25, kv_heads=5, head_dim=64), "mlp": MlpConfig(ffn_size=5504)},
            2,
            False,
            r"kv_heads=5 does not .*kv_heads=5 and model.mlp.ffn_size=5504 have no common divisor.*engine.shard=full.*dp_replicate",
        ),
    ],
)
def test_a_model_that_does_not_divide_is_refused(
    change: dict[str, object], tp: int, sequence_parallel: bool, message: str
) -> None:
    from megatron_lite.parallel.plans import check_divisible

    with pytest.raises(ValueError, match=message):
        check_divisible(replace(NEMOTRON, **change), tp=tp, sequence_parallel=sequence_parallel)


def test_a_layer_can_be_given_away_before_the_next_has_memory() -> None:
    """What DeepSpeed's stage 3 does: no more than one layer is whole at a time."""
    real: list[int] = []

    def distribute(decoder: torch.nn.Module, materialize: Materialize) -> None:
        assert isinstance(decoder, Decoder)
        for layer in decoder.layers:
            materialize(layer)
            assert not any(p.is_meta for p in layer.parameters())
            real.append(sum(not p.is_meta for p in decoder.parameters()))
            layer.to("meta")  # stands for: gives its memory away

    with pytest.raises(AssertionError, match="not materialized"):
        assemble(NEMOTRON, mesh=Mesh(), recipe=Recipe(), fill=seeded(SEED), wrap=bare, distribute=distribute)
    assert max(real) == max(len(list(layer.parameters())) for layer in Decoder(NEMOTRON).layers)


def fully_sharded(rank: int, world_size: int, parallel: ParallelConfig) -> dict[str, Tensor]:
    mesh = build_mesh(parallel.degrees(world_size), device=CPU)
    objective, _ = assemble(
        LLAMA,
        mesh=mesh,
        recipe=Recipe(parallel),
        fill=seeded(SEED),
        wrap=NextToken,
        distribute=FsdpConfig().distribute(mesh, torch.float32),
    )
    dist.barrier()
    return {name: p.full_tensor().detach() for name, p in objective.decoder.named_parameters()}  # type: ignore[attr-defined]


def test_weights_under_fsdp() -> None:
    results = run_ranks(4, fully_sharded, ParallelConfig(tp=2))
    whole = Decoder(LLAMA)
    initialize_model_(whole, SEED)
    for name, weight in whole.named_parameters():
        parts = [results[0][name], results[1][name]]
        dim = next((d for d in range(weight.dim()) if parts[0].shape[d] != weight.shape[d]), None)
        assert torch.equal(parts[0] if dim is None else torch.cat(parts, dim), weight), name
