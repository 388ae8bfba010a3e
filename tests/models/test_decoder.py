"""The decoder's own promises: names, padding, documents, cache, and gradients that reach every parameter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_lite.models import Decoder

NAMES = ["embedding.weight"]
NAMES += [f"layers.0.{name}" for name in ("norm.weight", "norm.bias", "mixer.qkv.weight", "mixer.out.weight")]
NAMES += [f"layers.1.{name}" for name in ("norm.weight", "norm.bias", "mixer.up.weight", "mixer.down.weight")]
NAMES += ["final_norm.weight", "final_norm.bias", "head.weight"]


def tokens_of(config, batch: int = 2, length: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_parameter_names_and_shapes_are_the_checkpoint_s(nemotron, llama):
    shapes = {n: tuple(p.shape) for n, p in Decoder(nemotron(num_layers=1)).named_parameters()}
    assert list(shapes) == NAMES
    assert shapes["embedding.weight"] == shapes["head.weight"] == (112, 48)
    assert shapes["layers.0.mixer.qkv.weight"] == ((4 + 2 * 2) * 12, 48)
    assert shapes["layers.1.mixer.down.weight"] == (48, 80)
    names = {n for n, _ in Decoder(llama(tie_embeddings=True)).named_parameters()}
    assert "layers.1.mixer.gate.weight" in names
    assert not any("bias" in name or name.startswith("head") for name in names)
    assert not dict(Decoder(nemotron()).named_buffers())


def test_logits_have_no_column_for_padding_and_padding_gets_no_gradient(nemotron, loud):
    config = nemotron()
    model = loud(config)
    logits = model(tokens_of(config))
    assert logits.shape == (2, 20, 101)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert not model.head_weight.grad[101:].any()
    assert not model.embedding.weight.grad[101:].any()


def test_tied_head_is_the_embedding(llama, loud):
    model = loud(llama(tie_embeddings=True))
    assert model.head_weight is model.embedding.weight
    tokens = tokens_of(model.config)
    expected = model.hidden(tokens) @ model.embedding.weight[:101].T
    torch.testing.assert_close(model(tokens), expected)  # the same product, perhaps summed in another order


@pytest.mark.parametrize("kind", ["nemotron", "llama"])
def test_packed_documents_equal_documents_run_alone(kind, request, loud):
    config = request.getfixturevalue(kind)()
    model = loud(config).double()
    rows = [[5, 1, 14], [11, 9]]
    tokens = tokens_of(config)
    documents = torch.tensor([[d for d, n in enumerate(row) for _ in range(n)] for row in rows])
    packed = model(tokens, documents)
    for row, lengths in enumerate(rows):
        start = 0
        for length in lengths:
            alone = model(tokens[row : row + 1, start : start + length])[0]
            # float64 with float32 angles that are equal on both sides: summation order only
            torch.testing.assert_close(packed[row, start : start + length], alone, rtol=0, atol=1e-9)
            start += length
    assert not torch.allclose(packed, model(tokens))


def test_one_document_equals_no_documents(nemotron, loud):
    model = loud(nemotron())
    tokens = tokens_of(model.config)
    # masked and causal attention are two kernels in float32; logits have std of about 3
    torch.testing.assert_close(model(tokens, torch.zeros_like(tokens)), model(tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunks", [[20], [7, 13], [1] * 20, [5, 1, 1, 6, 7]])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cached_forward_equals_the_whole(nemotron, loud, chunks, kv_heads):
    model = loud(nemotron(**{"attention.kv_heads": kv_heads})).double()
    tokens = tokens_of(model.config)
    cache = model.new_cache(20)
    parts = [model(part, cache=cache) for part in tokens.split(chunks, dim=1)]
    # float64: summation order only
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=0, atol=1e-9)
    assert cache.length == 20


def test_cache_refuses_overflow_and_documents(nemotron, loud):
    model = loud(nemotron())
    tokens = tokens_of(model.config)
    with pytest.raises(ValueError, match="holds 19 tokens and 20"):
        model(tokens, cache=model.new_cache(19))
    with pytest.raises(ValueError, match="holds one document"):
        model(tokens, torch.zeros_like(tokens), model.new_cache(20))


def test_a_model_without_positions_and_with_any_pattern_runs(nemotron, loud):
    model = loud(nemotron(**{"rope.fraction": 0.0, "num_layers": None, "pattern": "-*--"})).double()
    tokens = tokens_of(model.config)
    mixed = tokens[:, torch.cat([torch.randperm(19), torch.tensor([19])])]
    # without positions the last token sees a bag of tokens before it
    torch.testing.assert_close(model(tokens)[:, -1], model(mixed)[:, -1], rtol=0, atol=1e-9)


def test_a_layer_traces_in_one_graph(nemotron, loud):
    model = loud(nemotron())
    tokens = tokens_of(model.config)
    expected = model(tokens)
    for index in range(len(model.layers)):
        model.layers[index] = torch.compile(model.layers[index], backend="eager", fullgraph=True)
    # fp32: while it traces, torch takes the rotation's addcmul apart, which then rounds twice
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-5)


def test_recomputed_layers_give_the_same_gradients_to_the_last_bit(nemotron, loud):
    model = loud(nemotron())
    tokens = tokens_of(model.config)
    documents = torch.arange(20).div(8, rounding_mode="floor").expand(2, -1)

    def gradients(recompute: bool) -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        context = model.context(tokens, documents)
        x = model.embedding(tokens)
        for layer in model.layers:
            x, _ = checkpoint(layer, x, context, use_reentrant=False) if recompute else layer(x, context)
        model.logits(model.final_norm(x)).square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True)))
