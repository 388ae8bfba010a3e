"""config.json of hybrids: the pattern's three spellings, the limit on time steps, what published folders say, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, NemotronHConfig

from megatron_lite.models.huggingface import family_named
from megatron_lite.models.huggingface.rules import grouped

FAMILY = family_named("nemotron_h")
SIZES = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "mamba_num_heads": 6, "mamba_head_dim": 3, "n_groups": 2,
    "ssm_state_size": 5, "max_position_embeddings": 64, "chunk_size": 8,
}  # fmt: skip
SPELLINGS = {
    "letters": {"hybrid_override_pattern": "M-*M", "num_hidden_layers": 4},
    "words": {"layers_block_type": ["mamba", "mlp", "attention", "mamba"]},
    "words of transformers 5": {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"], "hybrid_override_pattern": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_pattern_goes_back_as_it_came(spelling):
    spelled = SPELLINGS[spelling] | {"time_step_min": 0.0}
    hf = SIZES | spelled
    config = FAMILY.from_hf_config(hf)
    assert config.pattern == "M-*M"
    extra = FAMILY.extra(hf, config)
    written = FAMILY.with_extra(config, extra)
    assert {key: written[key] for key in FAMILY.spellings if key in written} == spelled
    assert written["chunk_size"] == 8
    assert FAMILY.with_extra(config, FAMILY.extra(written, config)) == written
    config.pattern = "MM"  # another model than the folder's: its spelling says something else
    assert FAMILY.with_extra(config, extra)["hybrid_override_pattern"] == "MM"
    assert "layers_block_type" not in FAMILY.with_extra(config, extra)


def test_the_limit_of_time_steps_is_the_one_that_transformers_applies():
    """`time_step_min`, 0.001 where it is absent; `time_step_limit` is not read there, and kept."""
    hf = SIZES | SPELLINGS["letters"] | {"time_step_limit": [0.0, math.inf]}
    config = FAMILY.from_hf_config(hf)
    assert config.mamba.dt_limits == [0.001, math.inf]
    assert FAMILY.to_hf_config(config)["time_step_min"] == 0.001
    assert FAMILY.extra(hf, config)["time_step_limit"] == [0.0, math.inf]
    assert FAMILY.from_hf_config(hf | {"time_step_min": 0.0}).mamba.dt_limits is None
    written = FAMILY.to_hf_config(replace(config, mamba=replace(config.mamba, dt_limits=None)))
    assert FAMILY.from_hf_config(written).mamba.dt_limits is None
    assert (
        AutoModelForCausalLM.from_config(NemotronHConfig(**written)).num_parameters() > 0
    )  # initializes dt by its logarithm
    config.mamba.dt_limits = [0.001, 0.1]
    with pytest.raises(ValueError, match=r"model\.mamba\.dt_limits=\[0\.001, 0\.1\]"):
        FAMILY.to_hf_config(config)


def test_published_folders_name_their_code():
    code = {
        "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
        "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
    }
    FAMILY.from_hf_config(SIZES | SPELLINGS["letters"] | {"auto_map": code})
    with pytest.raises(ValueError, match="auto_map"):
        FAMILY.from_hf_config(SIZES | SPELLINGS["letters"] | {"auto_map": {"AutoConfig": "other.Config"}})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hybrid_override_pattern": "ME*"}, "'E'.*mixture of experts"),
        ({"layers_block_type": ["mamba", "moe"]}, "layers_block_type=.*moe"),
        ({"hybrid_override_pattern": None}, "layers_block_type=None and hybrid_override_pattern=None"),
        ({"use_conv_bias": False}, "use_conv_bias=False"),
        ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act='gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"n_groups": 4}, r"model\.mamba\.groups=4"),
    ],
)
def test_what_cannot_be_held_is_named(change, says):
    with pytest.raises(ValueError, match=says):
        FAMILY.from_hf_config(SIZES | SPELLINGS["letters"] | change)


def test_any_slice_of_grouped_rows_is_found():
    """Two groups of 2 z, 1 x, 1 dt: ours [z z x dt | z z x dt], theirs [z z z z | x x | dt dt]."""
    rule = grouped("ours", "theirs", groups=2, sizes=[2, 1, 1])
    order = [start + row for _, start, rows in rule.runs_of(8, start=0, count=8) for row in range(rows)]
    assert order == [0, 1, 4, 6, 2, 3, 5, 7]
    part = [start + row for _, start, rows in rule.runs_of(8, start=3, count=4) for row in range(rows)]
    assert part == order[3:7]
