"""The CPU stand-in for Transformer Engine is as strict as TE, and its kernels are right."""

from __future__ import annotations

import os
import pickle
import sys

import pytest
import torch

from tests.transformer_engine_on_cpu import needs_wheel, transformer_engine_on_cpu

pytestmark = needs_wheel


def linear(te, out=48, features=64):
    """A te.Linear with drawn weights."""
    torch.manual_seed(0)
    made = te.Linear(features, out, bias=False, params_dtype=torch.float32, device="cpu")
    torch.nn.init.normal_(made.weight)
    return made


@pytest.fixture(scope="module")
def te():
    with transformer_engine_on_cpu() as module:
        yield module


@pytest.fixture(scope="module")
def recipe(te):
    from transformer_engine.common import recipe

    return recipe


@pytest.mark.parametrize("name", ["DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling"])
def test_products_are_those_of_eight_bit_operands(te, recipe, name):
    module, x = linear(te), torch.randn(2, 24, 64, requires_grad=True)
    d_y = torch.randn(2, 24, 48)
    for _ in range(2):  # the second time delayed scaling has a scale
        module.weight.grad = x.grad = None
        with te.autocast(enabled=True, recipe=getattr(recipe, name)()):
            y = module(x)
        y.backward(d_y)
    exact = [x @ module.weight.T, d_y @ module.weight, d_y.flatten(0, 1).T @ x.flatten(0, 1)]
    for found, expected in zip([y, x.grad, module.weight.grad], exact):
        error = ((found - expected).norm() / expected.norm()).item()
        # E4M3 rounds by up to 2^-4 and E5M2 by up to 2^-3 of a value, 0.6 of that is usual; two operands
        assert 0.01 < error < 0.1


def test_mx_on_blackwell_only():
    with transformer_engine_on_cpu() as te:
        available, reason = te.is_mxfp8_available(return_reason=True)
        assert not available
        assert "10.0" in reason
    with transformer_engine_on_cpu((10, 0)) as te:
        from transformer_engine.common import recipe

        assert te.is_mxfp8_available()
        module, x = linear(te, 64), torch.randn(32, 64)
        with te.autocast(enabled=True, recipe=recipe.MXFP8BlockScaling()):
            assert 0.01 < ((module(x) - x @ module.weight.T).norm() / (x @ module.weight.T).norm()) < 0.1
    assert "transformer_engine.pytorch" not in sys.modules or sys.modules["transformer_engine.pytorch"] is not te


@pytest.mark.parametrize(("cuda", "available"), [("12.8", False), ("12.9", True)])
def test_block_scaling_needs_cuda_12_9(cuda, available):
    with transformer_engine_on_cpu((9, 0), cuda) as te:
        assert te.is_fp8_block_scaling_available() == available


def test_it_refuses_what_te_refuses(te, recipe):
    with pytest.raises(TypeError, match="out_feature"):
        te.Linear(64, out_feature=64)
    # A recipe ignores a keyword that it does not know: only the file of the API finds a misspelled one.
    assert not hasattr(recipe.Float8CurrentScaling(power_2_scales=True), "power_2_scales")
    with pytest.raises(ValueError, match="backward_override"):
        recipe.DelayedScaling(backward_override="high_precision")
    with pytest.raises(TypeError, match="fp8_group"), te.autocast(enabled=True, fp8_group=None):
        pass
    for tokens, features, out in ((12, 64, 48), (16, 24, 48), (16, 64, 40)):
        module, x = linear(te, out, features), torch.randn(tokens, features, requires_grad=True)
        with pytest.raises((ValueError, RuntimeError), match="16"), te.autocast(recipe=recipe.Float8CurrentScaling()):
            module(x).sum().backward()


def test_pickled_state_is_refused(te, recipe):
    module = linear(te)
    with te.autocast(enabled=True, recipe=recipe.DelayedScaling(amax_history_len=4)):
        module(torch.randn(16, 64))
    state = module.state_dict()["_extra_state"]
    assert pickle.loads(state.numpy().tobytes())["amax_history_fwd"].shape == (4, 3)
    with pytest.raises(RuntimeError, match="pickle"):
        module.load_state_dict({**module.state_dict(), "_extra_state": state})


def test_the_reference_quantizer_has_the_same_bytes(te):
    from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef

    x = torch.randn(40, 48) * 3
    for fp8, name in ((torch.float8_e4m3fn, "kFloat8E4M3"), (torch.float8_e5m2, "kFloat8E5M2")):
        reference = CurrentScalingQuantizerRef(fp8)(x)
        ours = te.Float8CurrentScalingQuantizer(te.DType[name], "cpu")(x)
        assert torch.equal(ours._data, reference.data.view(torch.uint8))
        assert torch.equal(ours._transpose, reference.data_t.view(torch.uint8))
        assert torch.equal(ours._scale_inv.reshape(()), reference.scale.reshape(()))


def test_nothing_of_it_stays(te):
    names = ("transformer_engine_torch", "onnx", "transformer_engine.pytorch.triton")
    before = {name: sys.modules.get(name) for name in names}
    environment = dict(os.environ)
    with transformer_engine_on_cpu():
        pass
    assert {name: sys.modules.get(name) for name in names} == before
    assert dict(os.environ) == environment
