"""Sampling against brute force over plain lists, generation against a loop without a cache."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.models.sampling import (
    SamplingConfig,
    filtered_probabilities,
    generate_batch,
    generate_tokens,
    sample_next,
)


def brute_force(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Textbook filters with Python floats and loops."""
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = order[:top_k] if top_k else order
    total, chosen, mass = sum(weights[i] for i in kept), [], 0.0
    for i in kept:
        if mass >= top_p and top_p < 1:
            break
        chosen.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in chosen)
    return [weights[i] / total if i in chosen else 0.0 for i in range(len(logits))]


@settings(max_examples=150)
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12),
    st.sampled_from([0.25, 0.7, 1.0, 3.0]),
    st.integers(0, 14),
    st.sampled_from([0.013, 0.317, 0.553, 0.907, 1.0]),  # not sums that small logits reach exactly
)
def test_filters_equal_brute_force(tenths, temperature, top_k, top_p):
    logits = [tenth / 10 for tenth in tenths]
    expected = brute_force(logits, temperature, top_k, top_p)
    actual = filtered_probabilities(torch.tensor([logits, logits]), temperature=temperature, top_k=top_k, top_p=top_p)
    for row in actual:
        torch.testing.assert_close(row.double(), torch.tensor(expected).double(), rtol=0, atol=1e-5)


def test_samples_follow_the_probabilities_and_the_seed():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20_000, -1)
    draws = sample_next(logits, temperature=0.7, top_k=3, generator=torch.Generator().manual_seed(0))
    again = sample_next(logits, temperature=0.7, top_k=3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)
    shares = torch.bincount(draws, minlength=4) / len(draws)
    expected = torch.tensor(brute_force([2.0, 1.0, 0.0, -1.0], 0.7, 3, 1.0))
    assert shares[3] == 0
    torch.testing.assert_close(shares, expected.float(), rtol=0, atol=0.02)  # five standard errors


def test_greedy_takes_the_largest():
    assert sample_next(torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("kind", "changes", "new"),
    [
        ("nemotron", {}, 30),
        ("llama", {}, 30),
        ("llama", {"attention.qkv_bias": True, "attention.window": 9}, 40),  # Qwen2's biases, Mistral's window
        ("llama", {"attention.qk_norm": True}, 30),  # Qwen3
        ("hybrid", {}, 210),
        ("hymba", {}, 225),
    ],
)
def test_cached_greedy_equals_the_uncached_forward(kind, changes, new, request, loud):
    """Hymba's window of 12 is passed more than 200 tokens before the end."""
    model = loud(request.getfixturevalue(kind)(max_seq_len=256, **changes))
    prompt = [3, 14, 15, 92, 65]
    expected = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert len(set(expected)) > 10  # not one token over and over
    assert list(generate_tokens(model, prompt, max_new_tokens=new)) == expected[len(prompt) :]
    eod = expected[-1]
    stop = expected.index(eod, len(prompt))
    stopped = list(generate_tokens(model, prompt, max_new_tokens=30, end_tokens=[eod]))
    assert stopped == expected[len(prompt) : stop]


@pytest.mark.parametrize("kind", ["nemotron", "llama", "hybrid", "hymba"])
def test_a_batch_of_ragged_prompts_equals_one_by_one(kind, request, loud):
    model = loud(request.getfixturevalue(kind)(), std=0.2).double()  # a tie of rounded logits would decide otherwise
    prompts = [[3, 14, 15, 92, 65, 35], [89], list(range(40)), [7, 9]]
    for sampling in (SamplingConfig(), SamplingConfig(temperature=0.8, top_k=20, seed=3)):
        keys = {"max_new_tokens": 20, "sampling": sampling}
        alone = [list(generate_tokens(model, prompt, **keys)) for prompt in prompts]
        assert generate_batch(model, prompts, **keys) == alone
        ends = {alone[0][4], alone[2][9]}
        alone = [list(generate_tokens(model, prompt, end_tokens=ends, **keys)) for prompt in prompts]
        assert generate_batch(model, prompts, end_tokens=ends, **keys) == alone


def test_generation_streams_and_repeats_with_its_seed(nemotron, loud):
    model = loud(nemotron(), std=0.05)
    hot = SamplingConfig(temperature=1.0, top_p=0.95, seed=5)
    stream = generate_tokens(model, [1], max_new_tokens=20, sampling=hot)
    first = next(stream)  # one token is there before the others are made
    once = [first, *stream]
    assert once == list(generate_tokens(model, [1], max_new_tokens=20, sampling=hot))
    assert once != list(
        generate_tokens(model, [1], max_new_tokens=20, sampling=SamplingConfig(temperature=1.0, seed=6))
    )
    assert max(once) < model.config.vocab_size


@pytest.mark.parametrize(
    ("prompt", "new", "sampling", "message"),
    [
        ([], 5, {}, "no tokens"),
        ([101], 5, {}, "token 101, but model.vocab_size=101"),
        ([1], 0, {}, "max_new_tokens=0"),
        ([1, 2, 3], 62, {}, "lower max_new_tokens to 61"),
        ([1], 5, {"temperature": -1.0}, "sampling.temperature=-1.0"),
        ([1], 5, {"temperature": float("nan")}, "sampling.temperature=nan"),
        ([1], 5, {"top_k": -1}, "sampling.top_k=-1"),
        ([1], 5, {"top_p": 0.0}, "sampling.top_p=0.0"),
    ],
)
def test_impossible_requests_are_named(nemotron, loud, prompt, new, sampling, message):
    with pytest.raises(ValueError, match=message):
        list(generate_tokens(loud(nemotron()), prompt, max_new_tokens=new, sampling=SamplingConfig(**sampling)))
