"""The Mamba-2 mixer: the chunked scan against a loop over tokens in float64, states across calls, documents, what is kept for backward.

That the mixer is transformers' own is in `huggingface/test_transformers.py`, layouts are in `tests/engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lite.models.conv import CausalConv
from megatron_lite.models.flops import flops_per_token, parameter_count
from megatron_lite.models.initialization import initialize_model_
from megatron_lite.models.mamba import GatedGroupNorm, Mamba2
from megatron_lite.models.pattern import LayerSpec
from megatron_lite.models.scan import Operands, Past
from megatron_lite.models.ssd import ssd

BATCH, HEADS, GROUPS, WIDTH, STATES = 2, 6, 2, 3, 5
SEGMENT = 96


def token_loop(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, documents: Tensor
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t, from zero in a new document."""
    B, C = (tensor.repeat_interleave(HEADS // GROUPS, dim=2) for tensor in (B, C))
    outputs = []
    for t in range(x.shape[1]):
        if t:
            state = state * (documents[:, t] == documents[:, t - 1])[:, None, None, None]
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + dt[:, t, :, None, None] * x[:, t, :, :, None] * B[:, t, :, None, :]
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, dim=1), state


def scan_inputs(length: int, strength: float, seed: int) -> tuple[list[Tensor], Tensor]:
    """(x, dt, A, B, C, state) in float64 with dt A down to -`strength` a step, mostly far less; and documents,
    one of which begins with a segment."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(length, HEADS, WIDTH), (length, GROUPS, STATES), (length, GROUPS, STATES), (HEADS, WIDTH, STATES)]
    x, B, C, state = (torch.randn(BATCH, *shape, generator=draw, dtype=torch.float64) for shape in shapes)
    dt = torch.rand(BATCH, length, HEADS, generator=draw, dtype=torch.float64) ** 4
    A = -strength * (0.1 + 0.9 * torch.rand(HEADS, generator=draw, dtype=torch.float64))
    begins = torch.rand(BATCH, length, generator=draw) < 3 / length
    begins[0, SEGMENT : SEGMENT + 1] = True
    return [x, dt, A, B, C, state], begins.long().cumsum(1)


def values_and_gradients(
    scan: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], documents: Tensor
) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    outputs = scan(*leaves, documents)
    draw = torch.Generator().manual_seed(1)
    total = sum((y * torch.randn(y.shape, generator=draw, dtype=torch.float64).to(y.dtype)).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(total, leaves)]


# initial dt A is between -1.6 and -0.001
@settings(max_examples=12)
@given(
    st.integers(1, 150),
    st.sampled_from([1, 16, 64, 200]),
    st.sampled_from([0.1, 2.0, 60.0]),
    st.booleans(),
    st.integers(0, 99),
)
@example(150, 64, 2.0, True, 0)  # two segments and several documents
def test_chunks_equal_the_loop_over_tokens(length, chunk, strength, packed, seed):
    check_scan(length, chunk, strength, packed=packed, seed=seed)


def test_a_long_sequence():
    check_scan(2048, 64, 60.0, packed=False, seed=0)


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """Segments that short sequences have several of."""
    monkeypatch.setattr("megatron_lite.models.ssd.SEGMENT", SEGMENT)


def check_scan(length: int, chunk: int, strength: float, *, packed: bool, seed: int) -> None:
    inputs, documents = scan_inputs(length, strength, seed)
    documents = documents if packed else torch.zeros_like(documents)
    expected = values_and_gradients(token_loop, inputs, documents)

    def chunked(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        *others, state, documents = leaves
        return ssd(Operands(*others), Past(state, documents if packed else None), chunk=chunk)

    # of the largest value: the rounding of a few hundred sums
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        actual = values_and_gradients(chunked, [tensor.to(dtype) for tensor in inputs], documents)
        for number, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
            assert got.dtype == dtype
            error = (got.double() - wanted).abs().max() / wanted.abs().max()
            assert error <= tolerance, f"output {number} in {dtype} is off by {error:.1e}"


# ------------------------------------------------------------------ the mixer and decoders with it


def tokens_of(length: int = 40) -> Tensor:
    return torch.randint(0, 101, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pattern", ["M", "M-M*-"])
def test_packed_documents_equal_documents_run_alone(hybrid, loud, pattern):
    model = loud(hybrid(pattern=pattern)).double()
    tokens = tokens_of()
    rows = [[5, 1, 2, 32], [19, 21]]
    documents = torch.tensor([[d for d, n in enumerate(row) for _ in range(n)] for row in rows])
    packed = model(tokens, documents)
    for row, lengths in enumerate(rows):
        for part, alone in zip(packed[row].split(lengths), tokens[row].split(lengths)):
            torch.testing.assert_close(part, model(alone[None])[0], rtol=0, atol=1e-9)  # float64: order of sums
    assert not torch.allclose(packed, model(tokens))


def leak(kind: str, patch: pytest.MonkeyPatch) -> None:
    """A state, or a convolution, that goes on in the next document."""
    if kind == "state":
        patch.setattr("megatron_lite.models.mamba.StateSpace.scan", lambda self, operands, past: ssd(operands))
    else:
        right = CausalConv.forward
        patch.setattr(CausalConv, "forward", lambda self, x, state, documents, **_: right(self, x, state, None))


@pytest.mark.parametrize("kind", ["state", "convolution"])
def test_a_planted_leak_between_documents_is_found(hybrid, loud, kind, monkeypatch):
    leak(kind, monkeypatch)
    with pytest.raises(AssertionError):
        test_packed_documents_equal_documents_run_alone(hybrid, loud, "M")


@pytest.mark.parametrize("chunks", [[7, 33], [1] * 40, [3, 1, 1, 30, 5]])
def test_cached_forward_equals_the_whole(hybrid, loud, chunks):
    model = loud(hybrid()).double()
    tokens = tokens_of()
    cache = model.new_cache(40)
    parts = [model(part, cache=cache) for part in tokens.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=0, atol=1e-9)
    assert cache.length == 40
    assert cache.layers[0].ssm.shape == (2, HEADS, WIDTH, STATES)
    assert cache.layers[0].conv.shape == (2, 3, HEADS * WIDTH + 2 * GROUPS * STATES)
    assert cache.layers[1] is None


def test_the_convolution_is_torchs():
    """Values and gradients, a state in front of it."""
    torch.manual_seed(0)
    conv, reference = CausalConv(5, 4).double(), torch.nn.Conv1d(5, 5, 4, groups=5).double()
    conv.load_state_dict(reference.state_dict())
    x, state = torch.randn(2, 9, 5).double(), torch.randn(2, 3, 5).double()
    grad = torch.randn(2, 9, 5).double()
    whole = torch.cat([state, x], dim=1)
    results = []
    for module, run in (
        (conv, lambda: conv(whole[:, 3:], whole[:, :3])[0]),
        (reference, lambda: reference(whole.mT).mT),
    ):
        whole.requires_grad_().grad = None
        y = run()
        y.backward(grad)
        results.append([y.detach(), whole.grad, module.weight.grad, module.bias.grad])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


def test_the_convolution_of_packed_documents_is_that_of_each_alone():
    """Values and gradients; the second document is shorter than the taps reach."""
    torch.manual_seed(0)
    conv = CausalConv(5, 4).double()
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter)
    x, grad = torch.randn(1, 9, 5).double(), torch.randn(1, 9, 5).double()
    documents = torch.tensor([[0] * 4 + [1] * 2 + [2] * 3])
    results = []
    for run in (
        lambda x: conv(x, None, documents)[0],
        lambda x: torch.cat([conv(y)[0] for y in x.split([4, 2, 3], 1)], 1),
    ):
        inputs = [x.clone().requires_grad_(), *conv.parameters()]
        y = run(inputs[0])
        results.append([y, *torch.autograd.grad(y, inputs, grad)])
    for packed, alone in zip(*results):
        torch.testing.assert_close(packed, alone)


def test_group_norm_is_of_each_group_alone():
    norm = GatedGroupNorm(8, eps=0.0)
    torch.nn.init.constant_(norm.weight, 1.0)
    y, gate = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    normed = norm(y, gate).detach().view(3, 2, 4)
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(3, 2))
    expected = y * torch.nn.functional.silu(gate)
    torch.testing.assert_close(normed, expected / expected.square().mean(-1, keepdim=True).sqrt())


def test_time_steps_keep_their_limits(hybrid, loud):
    """Drawn on both sides of both limits; without limits the numbers are others."""
    free, limited = (loud(hybrid(**{"pattern": "M", "mamba.dt_limits": limits})) for limits in (None, [0.5, 0.8]))
    seen: list[Tensor] = []
    for model in (free, limited):
        scan = model.layers[0].mixer.ssm.scan
        model.layers[0].mixer.ssm.scan = lambda operands, past, scan=scan: (
            seen.append(operands.dt),
            scan(operands, past),
        )[1]
    outputs = [model(tokens_of()) for model in (free, limited)]
    assert seen[0].min() < 0.5
    assert seen[0].max() > 0.8
    assert torch.equal(seen[1], seen[0].clamp(0.5, 0.8))
    assert not torch.allclose(*outputs)


def test_initial_values(hybrid):
    """A uniform in [1, 16], dt log-uniform in [0.001, 0.1], the convolution within 1 / sqrt(taps), D and gains one."""
    config = hybrid(**{"pattern": "M", "mamba.heads": 4000, "mamba.head_dim": 1, "mamba.groups": 4, "mamba.state": 1})
    mixer = Mamba2(config, LayerSpec("M"))
    initialize_model_(mixer, 0)
    A, dt = mixer.ssm.A_log.exp(), torch.nn.functional.softplus(mixer.ssm.dt_bias.double())
    for values, low, high in (
        (A, 1, 16),
        (dt.log10(), -3, -1),
        (mixer.conv.weight, -0.5, 0.5),
        (mixer.conv.bias, -0.5, 0.5),
    ):
        assert low <= values.min() + 1e-6
        assert values.max() - 1e-6 <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))  # 4 standard errors
        assert values.std().item() == pytest.approx((high - low) / 12**0.5, rel=0.05)
    assert torch.equal(mixer.ssm.D, torch.ones(4000))
    assert torch.equal(mixer.norm.weight, torch.ones(4000))


def kept_bytes(length: int, states: int, batch: int = 2) -> tuple[int, int]:
    """(bytes that the scan keeps for backward, bytes of its inputs)."""
    inputs = [
        torch.randn(batch, length, HEADS, WIDTH), torch.rand(batch, length, HEADS), -torch.rand(HEADS),
        torch.randn(batch, length, GROUPS, states), torch.randn(batch, length, GROUPS, states),
    ]  # fmt: skip
    leaves = [tensor.requires_grad_() for tensor in inputs]
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = ssd(Operands(*leaves))
    y.sum().backward()
    return sum(kept.values()), sum(tensor.nbytes for tensor in inputs)


@pytest.mark.parametrize(("length", "states"), [(128, 4), (512, 4), (512, 64)])
def test_backward_keeps_the_inputs_and_at_most_a_state_a_chunk(length, states):
    kept, inputs = kept_bytes(length, states)
    assert kept <= inputs + 4 * 2 * length / 64 * HEADS * WIDTH * states


def test_flops_count_the_scan(hybrid):
    config = hybrid(pattern="MM-")
    matrices = parameter_count(config) - 101 * config.hidden_size
    assert flops_per_token(config, 16) == flops_per_token(config, 4096)
    assert flops_per_token(config, 16) == 6 * matrices + 2 * 21 * HEADS * WIDTH * STATES


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mamba.version", 1, r"model\.mamba\.version=1"),
        ("mamba.dt_rank", 8, r"model\.mamba\.dt_rank=8"),
        ("mamba.heads", 0, r"model\.mamba\.heads=0"),
        ("mamba.state", 0, r"model\.mamba\.state=0"),
        ("mamba.groups", 4, r"model\.mamba\.heads=6 .*model\.mamba\.groups=4"),
        ("mamba.dt_limits", [0.1], r"model\.mamba\.dt_limits=\[0\.1\]"),
        ("mamba.dt_limits", [0.2, 0.1], r"model\.mamba\.dt_limits=\[0\.2, 0\.1\]"),
    ],
)
def test_impossible_mixers_are_refused_by_name(hybrid, key: str, value: Any, message: str):
    with pytest.raises(ValueError, match=message):
        hybrid(**{key: value}).validate()
