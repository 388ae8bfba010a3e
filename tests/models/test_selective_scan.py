"""Mamba-1's scan against a loop over tokens in float64: values, gradients, documents, what it keeps and how many steps it takes."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.models import selective_scan as scans
from megatron_lite.models.scan import Operands, Past
from megatron_lite.models.selective_scan import selective_scan

BATCH, CHANNELS, STATES = 2, 4, 3


def token_loop(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, begins: Tensor, prefix: int
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t; a later document begins with what the prefix left, or zero."""
    outputs, restart = [], torch.zeros_like(state)
    for t in range(x.shape[1]):
        if prefix and t == prefix:
            restart = state
        state = torch.where(begins[:, t, None, None], restart, state)
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1))
    return torch.stack(outputs, dim=1), state


def inputs_of(length: int, strength: float, seed: int) -> list[Tensor]:
    """(x, dt, A, B, C, state) in float64, with dt A down to -`strength` a step."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    dt = torch.rand(BATCH, length, CHANNELS, generator=draw, dtype=torch.float64) ** 4
    A = -strength * (0.1 + 0.9 * torch.rand(CHANNELS, STATES, generator=draw, dtype=torch.float64))
    tokens = (BATCH, length)
    return [
        normal(*tokens, CHANNELS),
        dt,
        A,
        normal(*tokens, STATES),
        normal(*tokens, STATES),
        normal(BATCH, CHANNELS, STATES),
    ]


def values_and_gradients(run, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    outputs = run(*leaves)
    draw = torch.Generator().manual_seed(1)
    total = sum((y * torch.randn(y.shape, generator=draw, dtype=torch.float64).to(y)).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(total, leaves)]


@settings(max_examples=15)
@given(
    st.integers(1, 70),
    st.sampled_from([1, 7, 16, 64]),
    st.sampled_from([0.1, 2.0, 5000.0]),
    st.booleans(),
    st.integers(0, 9),
    st.integers(0, 99),
)
@example(600, 64, 2.0, True, 5, 0)
def test_chunks_equal_the_loop_over_tokens(length, chunk, strength, packed, prefix, seed):
    inputs = inputs_of(length, strength, seed)
    prefix = min(prefix, length - 1)
    begins = torch.rand(BATCH, length, generator=torch.Generator().manual_seed(seed)) < 4 / length
    begins[:, : prefix + 1] = False
    begins &= torch.tensor(packed)
    documents = begins.long().cumsum(1) if packed else None
    expected = values_and_gradients(lambda *leaves: token_loop(*leaves, begins, prefix), inputs)

    def chunked(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        *others, state = leaves
        return selective_scan(Operands(*others), Past(state, documents, prefix), chunk=chunk)

    # of the largest value: the rounding of a few hundred sums
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        actual = values_and_gradients(chunked, [tensor.to(dtype) for tensor in inputs])
        for number, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
            assert got.dtype == dtype
            error = (got.double() - wanted).abs().max() / wanted.abs().max()
            assert error <= tolerance, f"output {number} in {dtype} is off by {error:.1e}"


def test_a_call_goes_on_where_the_last_one_ended():
    inputs = inputs_of(50, 2.0, 0)
    whole, last = selective_scan(Operands(*inputs[:5]), Past(inputs[5]), chunk=8)
    state, parts = inputs[5], []
    for start, end in ((0, 1), (1, 30), (30, 50)):
        x, dt, B, C = (inputs[i][:, start:end] for i in (0, 1, 3, 4))
        y, state = selective_scan(Operands(x, dt, inputs[2], B, C), Past(state), chunk=8)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-12)


class Sizes(TorchDispatchMode):
    """The number of operators that ran, the largest result, and the largest exponent of an exponential."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.largest, self.exponent = 0, 0, -torch.inf

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function.overloadpacket.__name__ in ("exp", "exp_"):  # before it runs in place
            self.exponent = max(self.exponent, args[0].max().item())
        result = function(*args, **(kwargs or {}))
        self.calls += 1
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_steps_memory_and_exponents(monkeypatch):
    """At 2,048 tokens in chunks of 64: 32 steps, nothing larger than the states of a chunk, and only these of all 32 chunks are kept."""
    length, chunk, states, channels = 2048, 64, 8, 32
    steps = []
    right = scans._states
    monkeypatch.setattr(scans, "_states", lambda *args: (steps.append(1), right(*args))[1])
    x, dt = torch.randn(1, length, channels), torch.rand(1, length, channels) * 50
    A, (B, C) = -torch.rand(channels, states), torch.randn(2, 1, length, states)
    leaves = [tensor.requires_grad_() for tensor in (x, dt, A, B, C)]
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with Sizes() as sizes, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = selective_scan(Operands(*leaves), chunk=chunk)
        assert len(steps) == length / chunk
        forward_calls = sizes.calls
        y.sum().backward()
    of_a_chunk, of_inputs = chunk * channels * states, sum(tensor.nbytes for tensor in leaves)
    of_all_entering = length // chunk * channels * states
    assert sizes.largest <= max(of_a_chunk, of_all_entering, length * channels) < length * channels * states / 7
    assert sum(kept.values()) <= of_inputs + 4 * (of_all_entering + 2 * channels * states)
    assert forward_calls < 100 * length / chunk
    assert -torch.inf < sizes.exponent <= 0
    assert all(torch.isfinite(tensor.grad).all() for tensor in leaves)


def test_chunks_follow_the_cache():
    """On a CPU a chunk's states take a mebibyte, within limits; elsewhere the work on a chunk is compiled for one length."""
    sizes = {2**10: 64, 2**16: 16, 2**18: 4, 2**30: 4}
    assert {size: scans.chunk_tokens(size, device=torch.device("cpu")) for size in sizes} == sizes
    assert scans.chunk_tokens(2**18, device=torch.device("meta")) == 64


def test_the_work_on_a_chunk_is_one_graph():
    """What is compiled for a GPU, here with PyTorch's own kernels."""
    torch._dynamo.reset()
    x, dt, A, B, C, state = inputs_of(16, 2.0, 0)
    A, state, begins = A.T.contiguous(), state.mT.contiguous(), torch.arange(16).expand(2, -1) == 5
    part = scans.Chunk(x, dt, B, C, begins)
    for function, arguments in (
        (scans._states, (part, A, state, state)),
        (scans._gradients, (part, x, A, state, state, state)),
    ):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        for got, wanted in zip(compiled(*arguments), function(*arguments)):
            torch.testing.assert_close(got, wanted)
