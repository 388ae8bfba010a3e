"""Old keys: brought up to date where they are stored, answered with the new name where they are typed."""

from __future__ import annotations

import pytest
import yaml

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.renamed import RENAMED, renamed_key, upgraded
from megatron_lite.training.config import compose_run

FLAT = {"family": "llama", "num_heads": 4, "num_kv_heads": 2, "head_dim": None, "ffn_size": 64, "activation": "swiglu"}
FLAT |= {"rope_base": 5e5, "rotary_fraction": 1.0, "num_layers": 2, "unit": "*-", "pattern": None}


def test_a_flat_model_gets_its_sections():
    old = {"seed": 3, "model": dict(FLAT)}
    assert upgraded(old) == {
        "seed": 3,
        "model": {
            "family": "llama",
            "num_layers": 2,
            "pattern": None,
            "attention": {"heads": 4, "kv_heads": 2, "head_dim": None},
            "rope": {"base": 5e5, "fraction": 1.0},
            "mlp": {"ffn_size": 64, "activation": "swiglu"},
        },
    }
    assert old == {"seed": 3, "model": FLAT}  # stays as it is
    assert upgraded(upgraded(old)) == upgraded(old)


def test_a_unit_of_its_own_becomes_a_pattern():
    model = upgraded({"model": FLAT | {"unit": "*--"}})["model"]
    assert (model["num_layers"], model["pattern"]) == (None, "*--*--")


@pytest.mark.parametrize("tree", [{}, {"model": {}}, {"model": "x"}, {"data": {"seq_len": 4}}])
def test_what_has_no_old_keys_stays(tree):
    assert upgraded(tree) == tree


def test_every_new_name_exists_and_no_old_one_does():
    numbers = [new for new in RENAMED.values() if new.startswith("model.") and new != "model.mlp.activation"]
    run = compose_run([f"{new}=1" for new in numbers])
    assert (run.model.attention.heads, run.model.rope.base) == (1, 1.0)
    assert all(renamed_key(new) is None for new in RENAMED.values())


@pytest.mark.parametrize("old", [key for key in RENAMED if key.startswith("model.")])
def test_an_old_key_in_a_file_is_answered_with_the_new_one(tmp_path, old):
    (tmp_path / "model").mkdir()
    content = {"defaults": ["nemotron4_tiny", "_self_"], old.removeprefix("model."): 4}
    (tmp_path / "model" / "mine.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=rf"model/mine\.yaml: {old} is now {RENAMED[old]}$"):
        compose_run(["--config-dir", str(tmp_path), "model=mine"])
