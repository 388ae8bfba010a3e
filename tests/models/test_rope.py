"""Rotary positions against complex multiplication, and restarting positions against a loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_lite.models.rope import Rotary, apply_rotary, restarting_positions
from tests.model_configs import model_config


def rotary(dim: int, base: float = 10000.0, **numbers: object) -> Rotary:
    """One head of `dim`, all of which rotates, stretched to 64 tokens."""
    keys = {f"rope.{key}": value for key, value in numbers.items()}
    sizes = {"hidden_size": dim, "attention.heads": 1, "max_seq_len": 64}
    return Rotary(model_config(sizes | {"rope.base": base} | keys))


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 8), (8, 4), (12, 6)])
def test_rotation_is_multiplication_by_a_unit_complex_number(head_dim, rotary_dim):
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 2, head_dim, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 3]])
    tables = rotary(head_dim, 100.0, fraction=rotary_dim / head_dim).tables(positions, dtype=torch.float64)
    y = apply_rotary(x, *tables)
    half = rotary_dim // 2
    pair = torch.complex(x[..., :half], x[..., half:rotary_dim])
    for j in range(half):
        angle = positions.double() * 100.0 ** (-2 * j / rotary_dim)
        turned = pair[..., j] * torch.polar(torch.ones_like(angle), angle)[:, :, None, None]
        # float64 has 2e-16; tables in float32 would be off by 1e-7
        torch.testing.assert_close(y[..., j], turned.real, rtol=0, atol=1e-13)
        torch.testing.assert_close(y[..., half + j], turned.imag, rtol=0, atol=1e-13)
    assert torch.equal(y[..., rotary_dim:], x[..., rotary_dim:])


def test_gradient_is_that_of_finite_differences():
    x = torch.randn(2, 3, 1, 2, 6, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(1, 3, 1, 1, 2, dtype=torch.float64)
    # scaled, as yarn's tables are: then the transpose of the rotation is not its inverse
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, 1.2 * angles.cos(), 1.2 * angles.sin()), x)


def test_bf16_heads_rotate_with_float32_angles():
    cos, sin = rotary(4).tables(torch.tensor([[4095]]))
    assert cos.dtype == sin.dtype == torch.float32
    x = torch.ones(1, 1, 1, 1, 4, dtype=torch.bfloat16)
    y = apply_rotary(x, cos, sin)
    assert y.dtype == torch.bfloat16
    angle = torch.tensor(4095.0, dtype=torch.float64)
    # one bf16 rounding of the result (2^-9); angles rounded to bf16 would be whole radians off
    torch.testing.assert_close(y[0, 0, 0, 0, 0].double(), angle.cos() - angle.sin(), rtol=2**-8, atol=1e-4)


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5), min_size=1, max_size=3))
def test_positions_restart_with_every_document(rows):
    longest = max(sum(row) for row in rows)
    documents, expected = [], []
    for row in rows:
        lengths = [*row, longest - sum(row)]
        documents.append([d for d, n in enumerate(lengths) for _ in range(n)])
        expected.append([p for n in lengths for p in range(n)])
    assert restarting_positions(torch.tensor(documents)).tolist() == expected


LENGTHS = st.integers(2, 64)
SCALED = {
    "linear": st.fixed_dictionaries({"factor": st.floats(1, 40)}),
    "llama3": st.fixed_dictionaries(
        {
            "factor": st.floats(1, 40),
            "original_seq_len": LENGTHS,
            "low_freq_factor": st.floats(0.1, 2),
            "high_freq_factor": st.floats(2.1, 8),
        }
    ),
    "yarn": st.fixed_dictionaries(
        {
            "factor": st.floats(1, 40),
            "original_seq_len": LENGTHS,
            "beta_fast": st.floats(2, 40),
            "beta_slow": st.floats(0.1, 1.9),
        },
        optional={"attention_factor": st.floats(0.5, 2)},
    ),
}


@pytest.mark.parametrize("scaling", SCALED)
@given(st.data(), st.sampled_from([4, 12, 64]), st.sampled_from([100.0, 5e5]))
def test_scaled_frequencies_are_those_of_transformers(scaling, data, dim, base):
    numbers = data.draw(SCALED[scaling])
    theirs = {"rope_type": scaling, "rope_theta": base} | numbers
    theirs["original_max_position_embeddings"] = theirs.pop("original_seq_len", 1)
    config = LlamaConfig(hidden_size=dim, num_attention_heads=1, max_position_embeddings=64)
    config.rope_parameters = theirs
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling](config, None)
    positions = torch.tensor([[0, 1, 63, 5000]])
    ours = rotary(dim, base, scaling=scaling, **numbers)
    cos, sin = ours.tables(positions)
    angles = positions[0, :, None].float() * frequencies
    # the same operations in another order round the angle by 2^-22 of its value
    within = {"rtol": 0, "atol": 2**-22 * 5000 * 1.5 + 1e-6}
    torch.testing.assert_close(cos[0, :, 0, 0], angles.cos() * factor, **within)
    torch.testing.assert_close(sin[0, :, 0, 0], angles.sin() * factor, **within)


def test_ntk_is_transformers_dynamic_at_one_length():
    """Hymba: factor 2, from 2,048 to 8,192 tokens, head dim 64."""
    numbers = {"scaling": "ntk", "factor": 2.0, "original_seq_len": 16}
    config = LlamaConfig(hidden_size=12, num_attention_heads=1, max_position_embeddings=16)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, None, seq_len=64)
    positions = torch.tensor([[3]])
    cos, _ = rotary(12, 100.0, **numbers).tables(positions)
    torch.testing.assert_close(cos[0, 0, 0, 0], (3 * frequencies).cos())
    sizes = {"hidden_size": 64, "attention.heads": 1, "max_seq_len": 8192}
    hymba = Rotary(
        model_config(sizes | {f"rope.{key}": value for key, value in (numbers | {"original_seq_len": 2048}).items()})
    )
    slowest = hymba.tables(torch.ones(1, 1, dtype=torch.int64), dtype=torch.float64)[
        1
    ].min()  # base^(-62/64) at position 1
    assert slowest.asin().item() ** (-64 / 62) == pytest.approx(74_535, abs=1)
