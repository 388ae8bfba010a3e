"""AdamW against its equations in float64, the decay groups, and the skip."""

import pytest
import torch

from megatron_lite.optim.optimizer import AdamW, OptimConfig, decays

NO_SKIP = torch.zeros(())
MATRIX = {"head.weight": "matrix"}


def float64_adamw(w, gradients, lr, decay, betas, eps):
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        w = w - lr * decay * w - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return w


def test_updates_follow_the_equations():
    torch.manual_seed(0)
    config = OptimConfig(lr=0.01, weight_decay=0.3)
    start = {"layers.0.mixer.up.weight": torch.randn(5, 3), "layers.0.norm.weight": torch.randn(7)}
    live = {name: tensor.clone() for name, tensor in start.items()}
    optimizer = AdamW(live, config, {name: "norm" if "norm" in name else "matrix" for name in live})
    history = [{name: torch.randn_like(t) for name, t in start.items()} for _ in range(6)]
    for gradients in history:
        optimizer.step({k: g.clone() for k, g in gradients.items()}, lr=0.01, skip=NO_SKIP)
    for name, decay in (("layers.0.mixer.up.weight", 0.3), ("layers.0.norm.weight", 0.0)):
        want = float64_adamw(
            start[name].double(), [h[name].double() for h in history], 0.01, decay, config.betas, config.eps
        )
        # fp32 rounding over six updates of size 0.01
        torch.testing.assert_close(live[name].double(), want, rtol=0, atol=1e-6)
    assert optimizer.adam_step == 6


def test_a_skipped_step_leaves_everything_as_it_was():
    live = {"head.weight": torch.ones(4, 4)}
    optimizer = AdamW(live, OptimConfig(), MATRIX)
    optimizer.step({"head.weight": torch.ones(4, 4)}, lr=0.1, skip=NO_SKIP)
    before = {"w": live["head.weight"].clone(), **{k: v.clone() for k, v in optimizer.moments().items()}}
    optimizer.step({"head.weight": torch.full((4, 4), float("nan"))}, lr=0.1, skip=torch.ones(()))
    after = {"w": live["head.weight"], **optimizer.moments()}
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert optimizer.adam_step == 1


def test_state_loaded_in_place_continues_bitwise():
    torch.manual_seed(1)
    gradients = [{"head.weight": torch.randn(3, 3)} for _ in range(4)]
    one = AdamW({"head.weight": torch.ones(3, 3)}, OptimConfig(), MATRIX)
    for g in gradients:
        one.step({"head.weight": g["head.weight"].clone()}, lr=0.1, skip=NO_SKIP)
    first = AdamW({"head.weight": torch.ones(3, 3)}, OptimConfig(), MATRIX)
    for g in gradients[:2]:
        first.step({"head.weight": g["head.weight"].clone()}, lr=0.1, skip=NO_SKIP)
    second = AdamW({"head.weight": first.parameters["head.weight"].clone()}, OptimConfig(), MATRIX)
    for key, tensor in second.moments().items():
        tensor.copy_(first.moments()[key])
    second.adam_step = first.adam_step
    for g in gradients[2:]:
        second.step({"head.weight": g["head.weight"].clone()}, lr=0.1, skip=NO_SKIP)
    assert torch.equal(one.parameters["head.weight"], second.parameters["head.weight"])


@pytest.mark.parametrize(
    ("kind", "switch"), [("norm", "decay_norms"), ("bias", "decay_biases"), ("embedding", "decay_embeddings")]
)
def test_each_kind_decays_only_when_asked(kind, switch):
    assert not decays(kind, OptimConfig())
    assert decays(kind, OptimConfig(**{switch: True}))


def test_matrices_always_decay_and_states_never():
    everything = OptimConfig(decay_norms=True, decay_biases=True, decay_embeddings=True)
    assert decays("matrix", OptimConfig())
    assert not decays("state", everything)


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"lr": 0}, r"optim\.lr"), ({"betas": [0.9]}, "betas"), ({"clip_grad": -1}, "clip_grad"), ({"eps": 0}, "eps")],
)
def test_values_that_cannot_be(keys, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**keys).validate()
