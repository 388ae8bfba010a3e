"""Symbols of layers, and the layer types that they name: a new one is a file of its own and two rows."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megatron_lite.models.cache import LayerCache
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.context import LayerContext
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.flops import flops_per_token
from megatron_lite.models.initialization import initialize_model_
from megatron_lite.models.layers import LAYER_TYPES, LayerType
from megatron_lite.models.linear import Linear
from megatron_lite.models.pattern import NOT_BUILT, LayerSpec, expand
from megatron_lite.parallel.layers import TensorParallel
from megatron_lite.parallel.plans import MIXERS, MixerPlan, apply_plan, check_divisible, column, decoder_plan, row


def test_blocks_are_repeated():
    assert expand(num_layers=3, pattern=None) == "*-*-*-"


def test_pattern_is_taken_as_it_is_without_its_cuts():
    assert expand(num_layers=None, pattern="-*--") == "-*--"
    assert expand(num_layers=None, pattern="-*|--|") == "-*--"


@pytest.mark.parametrize(
    ("num_layers", "pattern", "message"),
    [
        (2, "*-", "exclude each other"),
        (None, None, "model.num_layers=None"),
        (0, None, "model.num_layers=0"),
        (None, "", "model.pattern='' has no layers"),
        (None, "||", r"model.pattern='\|\|' has no layers"),
    ],
)
def test_wrong_patterns_are_named(num_layers, pattern, message):
    with pytest.raises(ValueError, match=message):
        expand(num_layers=num_layers, pattern=pattern)


@pytest.mark.parametrize("symbol", ["S", *NOT_BUILT])
def test_symbols_without_a_layer_are_refused_by_name(nemotron, symbol):
    with pytest.raises(
        ValueError, match=rf"model\.pattern=.* has '{re.escape(symbol)}' as layer 2.*'\*' attention"
    ) as caught:
        nemotron(num_layers=None, pattern=f"*-|{symbol}-").validate()
    assert NOT_BUILT.get(symbol, "") in str(caught.value)


# ------------------------------------------------------------------ a layer type of one's own


class Previous(nn.Module):
    """out(in(x_t) + in(x_{t-1})): a layer that remembers one token."""

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.into = Linear(config.hidden_size, config.mlp.ffn_size, init_std=config.init_std)
        self.out = Linear(config.mlp.ffn_size, config.hidden_size, init_std=config.output_init_std)

    def forward(self, x_BTD: Tensor, context: LayerContext) -> tuple[Tensor, None]:
        h_BTF = self.into(x_BTD)
        last = torch.zeros_like(h_BTF[:, :1])
        if isinstance(context.cache, LastToken):
            before, context.cache.state = context.cache.state, h_BTF[:, -1:]
            last = last if before is None else before
        return self.out(h_BTF + torch.cat([last, h_BTF[:, :-1]], dim=1)), None


class LastToken(LayerCache):
    def __init__(self) -> None:
        self.state: Tensor | None = None

    def nbytes(self) -> int:
        return 0 if self.state is None else self.state.nbytes


def check(config: ModelConfig) -> None:
    if config.mlp.ffn_size % 2:
        raise ValueError(f"model.mlp.ffn_size={config.mlp.ffn_size} must be even")


@pytest.fixture
def with_previous(monkeypatch):
    """The two rows."""
    row_of_models = LayerType("previous token", Previous, check, lambda *_: 1000.0, lambda *_: LastToken())
    monkeypatch.setitem(LAYER_TYPES, "P", row_of_models)
    plan = MixerPlan({"into": (column,), "out": (row,)}, lambda config: {"model.mlp.ffn_size": config.mlp.ffn_size})
    monkeypatch.setitem(MIXERS, Previous, plan)


def test_a_new_layer_type_is_one_file_and_two_rows(nemotron, with_previous):
    config = nemotron(num_layers=None, pattern="P*P-")
    plain = replace(config, pattern="-*--")
    assert flops_per_token(config, 16) == flops_per_token(plain, 16) + 2 * 1000  # same parameters
    model = Decoder(config)
    initialize_model_(model, 0)
    tokens = torch.arange(20).view(2, 10)
    cache = model.new_cache(10)
    parts = [model(part, cache=cache) for part in tokens.split([4, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens))

    with torch.device("meta"):
        cut = Decoder(config)
    apply_plan(cut, decoder_plan(cut), TensorParallel(1, 2, group=None))  # type: ignore[arg-type]
    assert cut.layers[0].mixer.into.weight.shape == (40, 48)
    assert cut.layers[0].mixer.out.weight.shape == (48, 40)
    with pytest.raises(ValueError, match=r"model\.mlp\.ffn_size=80 does not divide by parallel\.tp=3"):
        check_divisible(replace(config, vocab_multiple=3, pattern="PP"), tp=3)
    with pytest.raises(ValueError, match=r"model\.mlp\.ffn_size=81 must be even"):
        nemotron(**{"num_layers": None, "pattern": "P", "mlp.ffn_size": 81}).validate()


def test_a_layer_type_without_a_plan_is_not_cut(nemotron, with_previous, monkeypatch):
    monkeypatch.delitem(MIXERS, Previous)
    config = nemotron(num_layers=None, pattern="*P-")
    check_divisible(config, tp=1)
    with pytest.raises(ValueError, match=r"layer 1 is a Previous.*parallel\.tp=1"):
        check_divisible(config, tp=2)
