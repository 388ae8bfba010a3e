"""The Hymba reference against what exists elsewhere of its parts: Jamba's Mamba-1 mixer (the same branch, with norms on dt, B and
C), torch's attention under a dense mask, and the published numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import JambaConfig
from transformers.models.jamba.modeling_jamba import JambaMambaMixer

from tests.models import hymba_reference as reference

TINY: dict[str, Any] = reference.PUBLISHED_1P5B | {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "v_head_dim": 12,
    "intermediate_size": 20,
    "vocab_size": 31,
    "num_memory_tokens": 3,
    "sliding_window": 4,
    "global_attn_idx": [0],
    "kv_reuse_group": [[1, 2, 3]],
    "mamba_d_state": 5,
    "mamba_dt_rank": 7,
}
EXACT = {"rtol": 0, "atol": 1e-12}  # float64 in another order


def test_published_shapes_and_rope():
    assert sum(math.prod(shape) for shape in reference.shapes(reference.PUBLISHED_1P5B).values()) == 1_522_797_824
    assert reference.rope_base(reference.PUBLISHED_1P5B) == pytest.approx(74_535, abs=1)
    assert reference.rope_base(reference.PUBLISHED_1P5B | {"rope_type": None}) == 10_000


def test_state_space_branch_is_jambas():
    inner = 2 * TINY["hidden_size"]
    tensors = reference.random_tensors(TINY)
    own = {name.removeprefix("model.layers.0."): weight for name, weight in tensors.items()}
    mixer = JambaMambaMixer(
        JambaConfig(
            hidden_size=inner,
            mamba_expand=1,
            mamba_d_state=TINY["mamba_d_state"],
            mamba_d_conv=TINY["mamba_d_conv"],
            mamba_dt_rank=TINY["mamba_dt_rank"],
            rms_norm_eps=TINY["rms_norm_eps"],
        ),
        layer_idx=0,
    ).double()
    parts = {name: own[f"mamba.{name}"] for name in ("conv1d.weight", "conv1d.bias")}
    parts |= {name: own[f"mamba.{name}.0"] for name in ("A_log", "D")}
    parts |= {f"{name}.weight": own[f"mamba.{name}.0.weight"] for name in ("x_proj", "dt_proj")}
    parts["dt_proj.bias"] = own["mamba.dt_proj.0.bias"]
    parts |= {f"{name.lower()}_layernorm.weight": own[f"mamba.{name}_layernorm.weight"] for name in ("dt", "B", "C")}
    generator = torch.Generator().manual_seed(1)
    parts["in_proj.weight"] = torch.randn(2 * inner, inner, generator=generator, dtype=torch.float64) / 5
    parts["out_proj.weight"] = torch.eye(inner, dtype=torch.float64)
    mixer.load_state_dict(parts)
    u = torch.randn(1, 19, inner, generator=generator, dtype=torch.float64)
    x, z = (u[0] @ parts["in_proj.weight"].T).split(inner, dim=1)
    ours, taps, _ = reference.state_space(own, TINY, x, z)
    # Jamba casts its scan to float32 on the way
    torch.testing.assert_close(ours, mixer(u)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(taps, x[-3:])


def test_attention_is_torchs_under_the_dense_mask():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(4, 13, 6, generator=generator, dtype=torch.float64)
    keys, values = (torch.randn(2, 13, dim, generator=generator, dtype=torch.float64) for dim in (6, 12))
    sees = reference.allowed(TINY, length=13, is_global=False)
    assert sees.sum(1).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8, 8]  # 3 meta tokens and 5 newest tokens
    assert reference.allowed(TINY, length=13, is_global=True).sum() == 13 * 14 / 2
    expected = F.scaled_dot_product_attention(query[None], keys[None], values[None], attn_mask=sees, enable_gqa=True)[0]
    torch.testing.assert_close(
        reference.attention(query, keys, values, sees), expected.transpose(0, 1).flatten(1), **EXACT
    )


def test_a_layer_with_borrowed_keys_depends_on_its_lender_and_documents_do_not_on_each_other():
    tensors = reference.random_tensors(TINY)
    tokens = torch.randint(0, 31, (17,), generator=torch.Generator().manual_seed(2)).tolist()
    first = reference.run(tensors, TINY, tokens)
    assert first.logits_TV.shape == (17, 31)
    assert all(torch.equal(layer.keys_GSK, first.layers[1].keys_GSK) for layer in first.layers[2:])
    packed = reference.run_packed(tensors, TINY, tokens, [0] * 6 + [1] * 11)
    torch.testing.assert_close(packed[:6], first.logits_TV[:6], **EXACT)
    changed = reference.run_packed(tensors, TINY, [0, *tokens[1:]], [0] * 6 + [1] * 11)
    assert torch.equal(packed[6:], changed[6:])
    assert not torch.allclose(packed[:6], changed[:6])
