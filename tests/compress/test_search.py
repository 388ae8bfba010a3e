"""The search under a budget: what is listed fits, is as large as it may be, and costs what generation and `mlite plan` say."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from megatron_lite.commands.plan import PlanConfig
from megatron_lite.compress.scores import ImportanceConfig, random_scores
from megatron_lite.compress.search import BudgetConfig, candidates
from megatron_lite.compress.sizes import resized
from megatron_lite.compress.target import TargetConfig
from megatron_lite.config.compose import compose_config
from megatron_lite.models.cache_size import cache_bytes
from megatron_lite.models.flops import parameter_count
from tests.compress.test_prune import DENSE, HYBRID, prune

OPTIONS = ImportanceConfig()


def test_the_cache_of_nano2_at_128k():
    config = compose_config("plan", PlanConfig, ["model=nemotron_nano2_9b"]).model
    keys_and_values = 4 * 2 * 8 * 128 * 131072 * 2  # 4 attention layers, 8 heads of 128, bf16: 2 GiB
    states = 27 * (128 * 80 * 128 * 4 + 3 * 12288 * 2)  # of the scan in fp32, the convolution's last 3 inputs in bf16
    assert cache_bytes(config, 131072) == keys_and_values + states
    assert cache_bytes(config, 1024) == keys_and_values // 128 + states


@pytest.mark.parametrize("config", [DENSE, HYBRID])
def test_candidates_fit_and_are_as_large_as_they_may_be(config):
    limit = int(parameter_count(config) * 0.8)
    budget = BudgetConfig(parameters=limit, max_depth=0.3)
    found = candidates(config, random_scores(config, 0), OPTIONS, target=TargetConfig(), budget=budget)
    assert 2 < len(found) <= 8
    assert [candidate.kept for candidate in found] == sorted((candidate.kept for candidate in found), reverse=True)
    for candidate in found:
        made = resized(config, candidate.sizes, candidate.layers)
        assert candidate.parameters == parameter_count(made) <= limit
        assert candidate.cache == cache_bytes(made, 131072)
        ffn = candidate.sizes["ffn_size"]
        step = 64 if config is DENSE else 4
        if ffn < config.mlp.ffn_size:
            assert parameter_count(replace(made, mlp=replace(made.mlp, ffn_size=ffn + step))) > limit
    memory = (limit * 2 + 2 * cache_bytes(config, 64)) / 2**30
    within = BudgetConfig(memory_gib=memory, context=64, batch=2, axes=["heads", "ffn_size"], max_width=0.9)
    for candidate in candidates(config, random_scores(config, 0), OPTIONS, target=TargetConfig(), budget=within):
        assert candidate.parameters * 2 + candidate.cache <= memory * 2**30
        assert candidate.cache == 2 * cache_bytes(resized(config, candidate.sizes, candidate.layers), 64)
        assert candidate.sizes["hidden_size"] == config.hidden_size


def test_what_the_target_gives_is_not_searched():
    budget = BudgetConfig(parameters=int(parameter_count(DENSE) * 0.8))
    target = TargetConfig(hidden_size=224, num_layers=4)
    found = candidates(DENSE, random_scores(DENSE, 0), OPTIONS, target=target, budget=budget)
    assert {(c.sizes["hidden_size"], len(c.layers)) for c in found} == {(224, 8)}
    with pytest.raises(ValueError, match=r"budget\.parameters=1000 is not met.*budget\.max_width"):
        candidates(DENSE, random_scores(DENSE, 0), OPTIONS, target=target, budget=BudgetConfig(parameters=1000))
    deep = BudgetConfig(parameters=int(parameter_count(DENSE) * 0.8), axes=["num_layers"], max_depth=0.5)
    (shallower,) = candidates(DENSE, random_scores(DENSE, 0), OPTIONS, target=TargetConfig(ffn_size=768), budget=deep)
    made = resized(DENSE, shallower.sizes, shallower.layers)
    assert shallower.parameters == parameter_count(made) <= deep.parameters
    assert parameter_count(replace(made, num_layers=made.num_layers + 1)) > deep.parameters
    assert BudgetConfig(parameters=1, max_depth=0.29).units_to_remove(replace(DENSE, num_layers=100)) == 29
    fixed = BudgetConfig(parameters=10**6, axes=["hidden_size"])
    with pytest.raises(ValueError, match=r"budget\.axes=\['hidden_size'\].*nothing to search"):
        candidates(DENSE, random_scores(DENSE, 0), OPTIONS, target=target, budget=fixed)


@pytest.mark.slow
def test_the_search_of_a_large_model_is_bounded():
    """Nano 2 12B under 19.66 GiB at 128k, also over all its sizes: seconds, for layers that are alike are counted once."""
    config = compose_config("plan", PlanConfig, ["model=nemotron_nano2_12b"]).model
    scores = random_scores(config, 0)
    every = ["num_layers", "hidden_size", "heads", "mamba_heads", "mamba_head_dim", "ffn_size"]
    budget = BudgetConfig(memory_gib=19.66, axes=every, steps=2)
    start = time.process_time()
    found = candidates(config, scores, OPTIONS, target=TargetConfig(), budget=budget)
    assert time.process_time() - start < 20  # about 2; a decoder for every question took minutes
    for candidate in found[:2]:
        made = resized(config, candidate.sizes, candidate.layers)
        assert (candidate.parameters, candidate.cache) == (parameter_count(made), cache_bytes(made, 131072))
        assert candidate.parameters * 2 + candidate.cache <= 19.66 * 2**30
    with pytest.raises(ValueError, match=r"budget\.steps=10 for 6 budget\.axes makes 100,000 sizes"):
        BudgetConfig(memory_gib=1.0, axes=every, steps=10).validate()


def test_the_candidate_of_least_loss_is_cut(straight, tmp_path, capsys):
    words = ["budget.parameters=33000", "budget.top_k=3", "budget.max_depth=0.5", "importance.samples=16"]
    report = prune(capsys, f"checkpoint={straight}", f"output={tmp_path}/out", *words)
    found = report["candidates"]
    assert len(found) == 3
    assert [row["loss"] for row in found] == sorted(row["loss"] for row in found)
    assert report["parameters"][1] == found[0]["parameters"] <= 33000
    assert report["layer_map"] == found[0]["layers"]
