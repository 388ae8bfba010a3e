"""Delayed scaling against a plain reading of its rule in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_lite.precision.delayed import Histories
from megatron_lite.precision.formats import E4M3, E5M2
from megatron_lite.precision.recipes import RECIPES
from tests.precision.test_quantized_linear import build, operands, results

FORMATS = [E4M3, E4M3, E5M2]


@pytest.mark.parametrize(("compute", "length", "margin"), [("max", 3, 0), ("most_recent", 3, 2), ("max", 1, -1)])
def test_scales_follow_the_rule(compute: str, length: int, margin: int) -> None:
    draw = np.random.default_rng(0)
    amaxes = draw.uniform(0.1, 9.0, (9, 2, 3)).astype(np.float32)  # steps, records in one, tensors
    amaxes[2, :, 0] = 0.0
    amaxes[4, 1, 1], amaxes[5, 0, 2] = np.inf, 1e-40
    amaxes[5, 1, 2] = 0.0
    histories = Histories(FORMATS, length=length, margin=margin, amax_compute=compute, device=torch.device("cpu"))
    past: list[np.ndarray] = []
    scale = np.ones(3, np.float32)
    for step in amaxes:
        histories.recording = True
        for records in step:
            for index, amax in enumerate(records):
                histories.record(index, torch.tensor(amax))
        histories.recording = False
        histories.record(0, torch.tensor(1e9))  # an evaluation
        histories.advance(None)
        past = [*past, step.max(0)][-length:]
        amax = past[-1] if compute == "most_recent" else np.max(past, 0)
        for index, form in enumerate(FORMATS):
            if np.isfinite(amax[index]) and amax[index] > 0:
                with np.errstate(over="ignore"):
                    wanted = np.float32(form.largest / 2.0**margin) / amax[index]
                scale[index] = min(wanted, np.finfo(np.float32).max)
        np.testing.assert_array_equal(histories.scale.numpy(), scale)
    kept = np.array(past[-(length - 1) :] if length > 1 else np.zeros((0, 3)))
    np.testing.assert_array_equal(
        histories.amax_history.numpy(), np.concatenate([np.zeros((1, 3)), kept]).astype(np.float32)
    )


def test_a_layer_uses_the_scale_of_the_micro_batch_before() -> None:
    """Evaluations and diagnoses in between leave no trace."""
    linear, numerics = build(RECIPES["fp8_delayed"](amax_history_len=4))
    x, grad = operands()
    with numerics.micro_batch():
        results(linear, x, grad)
    before = {name: tensor.clone() for name, tensor in numerics.tensors().items()}
    assert before["scale_fwd.layer"].tolist() == pytest.approx(
        [448 / x.abs().max().item(), 448 / linear.weight.abs().max().item()]
    )
    assert before["scale_bwd.layer"].tolist() == pytest.approx([57344 / grad.abs().max().item()])
    assert before["amax_history_fwd.layer"].shape == (4, 2)
    with numerics.forward_only(), numerics.collect(lambda found: None):
        results(linear, 100 * x, 100 * grad)
    for name, tensor in numerics.tensors().items():
        assert torch.equal(tensor, before[name]), name
    current, _ = build(RECIPES["fp8_current"]())
    with numerics.micro_batch():
        again = results(linear, x, grad)
    for key, wanted in results(current, x, grad).items():
        assert torch.equal(again[key], wanted), key  # the same tensors: their scale is that of today


def test_numbers_that_outgrow_the_scale_saturate() -> None:
    linear, numerics = build(RECIPES["fp8_delayed"](), bias=False)
    x, grad = operands()
    with numerics.micro_batch():
        results(linear, x, grad)
    grown = results(linear, 4 * x, grad)["y"].float().abs().max()
    assert grown.isfinite()
    assert grown < 2 * results(linear, x, grad)["y"].float().abs().max()
