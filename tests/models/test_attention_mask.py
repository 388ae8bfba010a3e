"""Which keys a query sees: the dense mask, bands and FlexAttention's function against loops; and what a window costs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lite.models import attention_kernel
from megatron_lite.models.attention_kernel import attend, banded, with_blocks
from megatron_lite.models.attention_mask import Visibility, dense_mask, mask_function
from megatron_lite.models.cache import KeyValue
from megatron_lite.models.context import LayerContext
from megatron_lite.models.rope import restarting_positions
from megatron_lite.parallel.recompute import recompute_layer


def context_of(lengths: list[int], prefix: int) -> LayerContext:
    documents = torch.tensor([[0] * prefix + [number for number, n in enumerate(lengths) for _ in range(n)]])
    if len(lengths) == 1:
        return LayerContext(torch.arange(prefix + lengths[0])[None], prefix=prefix)
    return LayerContext(restarting_positions(documents, prefix=prefix), documents, prefix)


def loops(lengths: list[int], prefix: int, window: int | None, visible: int) -> Tensor:
    """(T, T): document by document, each with the prefix in front."""
    total = prefix + sum(lengths)
    sees = torch.zeros(total, total, dtype=torch.bool)
    start = prefix
    for length in lengths:
        index = [*range(prefix), *range(start, start + length)]
        for q, row in enumerate(index):
            for k in range(q + 1):
                sees[row, index[k]] = window is None or q - k <= window or k < visible
        start += length
    return sees


def heads(length: int) -> tuple[Tensor, KeyValue]:
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, n, length, 8, generator=draw, dtype=torch.float64) for n in (4, 2))
    return query, KeyValue(key, torch.randn(1, 2, length, 16, generator=draw, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=8)
@given(
    st.lists(st.integers(1, 150), min_size=1, max_size=3),
    st.integers(0, 9),
    st.sampled_from([None, 1, 5, 70]),
    st.sampled_from([0, 3, None]),
)
def test_all_forms_are_the_loops(lengths, prefix, window, visible):
    """visible None: the prefix."""
    visible = 0 if window is None else prefix if visible is None else visible
    context, rule = context_of(lengths, prefix), Visibility(window, visible)
    expected = loops(lengths, prefix, window, visible)
    length = len(expected)
    query, kv = heads(length)
    mask = dense_mask(context, kv, rule)
    assert torch.equal(expected, torch.ones_like(expected).tril() if mask is None else mask[0, 0])
    sees = mask_function(context, rule)
    index = torch.arange(length)
    assert torch.equal(sees(torch.zeros(1).long(), index, index[:, None], index[None]), expected)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, kv.key_BGSK, kv.value_BGSV, attn_mask=expected, enable_gqa=True
    )
    forms = [attend(query, kv, context, rule), with_blocks(query, kv, context, rule)]
    if window is not None and (context.documents_BT is None or visible == prefix):
        forms.append(banded(query, kv, context, rule))
    for form in forms:
        torch.testing.assert_close(form, wanted, rtol=0, atol=1e-12)


def scores(length: int, window: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many products of a query and a key one head computes."""
    found = []
    right = attention_kernel.AttentionKernel.__call__

    def watched(self, query, key, value, **more):  # type: ignore[no-untyped-def]
        found.append(query.shape[2] * key.shape[2])
        return right(self, query, key, value, **more)

    monkeypatch.setattr(attention_kernel.AttentionKernel, "__call__", watched)
    attend(*heads(length), LayerContext(torch.arange(length)[None]), Visibility(window, 4))
    return sum(found)


def test_a_window_costs_its_width(monkeypatch):
    """At eight windows: about one and a half windows of keys a query, not eight; and twice that at twice the length."""
    window = 128
    at_eight, at_sixteen = (scores(n * window, window, monkeypatch) for n in (8, 16))
    assert at_eight <= 8 * window * (1.5 * window + 4)
    assert at_sixteen <= 2.1 * at_eight


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_layers_that_see_alike_share_a_mask(llama, loud, monkeypatch, window, recompute):
    """Also in backward, where layers run again; a new forward makes new ones."""
    made = []
    right = attention_kernel.additive
    monkeypatch.setattr(attention_kernel, "additive", lambda *args: made.append(1) or right(*args))
    config = llama(**{"num_layers": 4, "attention.window": window, "attention.global_layers": [0, 2] if window else []})
    model = loud(config)
    for layer in model.layers:
        recompute_layer(layer, recompute)
    for documents in (torch.arange(20)[None] // 7, torch.arange(20)[None] // 9):
        made.clear()
        model(torch.arange(20)[None], documents).sum().backward()
        assert len(made) == (1 if window is None else 2)
