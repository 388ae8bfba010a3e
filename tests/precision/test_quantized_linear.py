"""The three products of a quantized linear layer, against numpy, torchao and plain bf16; what it keeps, counts and says."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_lite.models.linear import Linear
from megatron_lite.parallel.reclass import reclass
from megatron_lite.precision import formats, quantizers
from megatron_lite.precision.emulated import EmulatedNumerics, Maxima
from megatron_lite.precision.formats import E4M3, Quantized
from megatron_lite.precision.numerics import Observation
from megatron_lite.precision.quantized_linear import QuantizedLinear
from megatron_lite.precision.quantizers import Pair, TileScaling
from megatron_lite.precision.recipes import RECIPES, BlockScalingConfig, CurrentScalingConfig, Fp8Config
from tests.precision import oracle

CPU = torch.device("cpu")
TOKENS, INPUTS, OUTPUTS = 37, 136, 150  # blocks and tiles of 128 and of 32 are incomplete everywhere


def build(
    recipe: Fp8Config, *, bias: bool = True, dtype: torch.dtype = torch.bfloat16
) -> tuple[QuantizedLinear, EmulatedNumerics]:
    """A layer with random weights."""
    linear = Linear(INPUTS, OUTPUTS, init_std=1.0, bias=bias)
    draw = torch.Generator().manual_seed(1)
    for parameter in linear.parameters():
        parameter.data = (0.05 * torch.randn(parameter.shape, generator=draw)).to(dtype)
    numerics = EmulatedNumerics(recipe, ["layer"], maxima=Maxima(), device=CPU)
    reclass(linear, QuantizedLinear, quantizers=numerics.quantizers("layer"), mode=numerics.mode, path="layer")
    return linear, numerics  # type: ignore[return-value]


def operands(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """(input, gradient of the output), with outliers."""
    draw = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(shape, generator=draw) for shape in ((1, TOKENS, INPUTS), (1, TOKENS, OUTPUTS)))
    x[0, 3, 5], grad[0, 7, 11] = 40.0, -60.0
    return x.to(dtype), (1e-3 * grad).to(dtype)


def results(linear: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one forward and backward."""
    x = x.clone().requires_grad_()
    linear.zero_grad()
    y = linear(x)
    y.backward(grad)
    found = {"y": y.detach(), "dx": x.grad, "dw": linear.weight.grad}
    return found if linear.bias is None else found | {"db": linear.bias.grad}


def by_numpy(recipe: Fp8Config, linear: QuantizedLinear, x: Tensor, grad: Tensor) -> dict[str, np.ndarray]:
    """The same from operands that are quantized for each product alone, in float64."""

    def of(matrix: Tensor, form: str, block: tuple[int, int] | None) -> np.ndarray:
        """Quantized with the last dimension as the one that is summed over."""
        rule = oracle.mx_scale_of
        if recipe.name != "mxfp8":
            rule = lambda amax, form: oracle.scale_of(amax, form, power_of_two=powers, most=3e38)  # noqa: E731
        found = oracle.quantized(matrix.float().numpy(), form, block, lambda amax: rule(amax, form))
        return oracle.dequantized(*found)

    powers = getattr(recipe, "power_2_scales", False)
    forward, backward = ("E4M3", "E5M2") if recipe.format == "hybrid" else ("E4M3", "E4M3")
    tile, block = {"fp8_current": (None, None), "fp8_block": ((1, 128), (128, 128)), "mxfp8": ((1, 32), (1, 32))}[
        recipe.name
    ]
    x, grad, weight, bias = x[0], grad[0], linear.weight.detach(), linear.bias.detach()
    return {
        "y": of(x, forward, tile) @ of(weight, forward, block).T + bias.double().numpy(),
        "dx": of(grad, backward, tile) @ of(weight.T, forward, block).T,
        "dw": of(grad.T, backward, tile) @ of(x.T, forward, tile).T,
        "db": grad.double().sum(0).numpy(),
    }


def differences(recipe: Fp8Config, *, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """How far a layer is from numpy, relative to the largest number of each result."""
    linear, _ = build(recipe, dtype=dtype)
    x, grad = operands(dtype)
    wanted = by_numpy(recipe, linear, x, grad)
    found = results(linear, x, grad)
    assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys(found, dtype)
    return {
        name: float(np.abs(found[name].double().numpy().reshape(numbers.shape) - numbers).max() / np.abs(numbers).max())
        for name, numbers in wanted.items()
    }


# Products are summed in fp32 and leave it once: with fp32 operands 150 terms are off by 1e-6, in bf16 the result is rounded to 2^-9.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2.1 * 2.0**-9}
STATELESS = [name for name in RECIPES if name != "fp8_delayed"]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", STATELESS)
def test_three_products_against_numpy(name: str, dtype: torch.dtype) -> None:
    for form in ("hybrid", "e4m3"):
        found = differences(RECIPES[name](format=form), dtype=dtype)
        assert max(found.values()) < BOUNDS[dtype], found


def only_the_forward(patch: pytest.MonkeyPatch) -> None:
    honest = QuantizedLinear.quantize

    def quantize(self: QuantizedLinear, operand: str, x: Tensor) -> Pair:
        plain = Quantized(x, torch.ones(())), Quantized(x.T, torch.ones(()))
        return plain if operand == "grad_output" else honest(self, operand, x)

    patch.setattr(QuantizedLinear, "quantize", quantize)


def e4m3_everywhere(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Fp8Config, "formats", (E4M3, E4M3))


def scaled_after_the_cast(patch: pytest.MonkeyPatch) -> None:
    honest = formats.cast
    patch.setattr(
        quantizers, "cast", lambda x, scale, form: (honest(x, torch.ones(()), form).float() * scale).to(form.dtype)
    )


def transposed_from_what_was_quantized(patch: pytest.MonkeyPatch) -> None:
    def pair(self: TileScaling, x: Tensor) -> Pair:
        first = self._rows(x)
        return first, self._rows(first.values().T)

    patch.setattr(TileScaling, "pair", pair)


@pytest.mark.parametrize(
    ("plant", "recipe"),
    [
        (only_the_forward, CurrentScalingConfig()),
        (e4m3_everywhere, CurrentScalingConfig()),
        (scaled_after_the_cast, CurrentScalingConfig()),
        # a power of two hardly changes what is rounded: quantizing twice is then the same as once, but for tiny numbers
        (transposed_from_what_was_quantized, BlockScalingConfig(power_2_scales=False)),
    ],
)
def test_planted_bugs_are_seen(plant, recipe: Fp8Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(differences(recipe).values()) < BOUNDS[torch.float32]
    plant(monkeypatch)
    assert max(differences(recipe).values()) > 100 * BOUNDS[torch.float32]


def test_torchaos_layer_gives_the_same() -> None:
    """Tensorwise scaling of torchao is current scaling in the formats of `hybrid`; its scales are rounded once less (float64)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.float8 import Float8LinearConfig
        from torchao.float8.float8_linear import Float8Linear
    linear, _ = build(RECIPES["fp8_current"](), bias=False, dtype=torch.float32)
    plain = nn.Linear(INPUTS, OUTPUTS, bias=False)
    plain.weight.data.copy_(linear.weight)
    theirs = Float8Linear.from_float(plain, Float8LinearConfig(emulate=True))
    x, grad = operands(torch.float32)
    wanted = results(theirs, x, grad)
    for key, found in results(linear, x, grad).items():
        assert (found - wanted[key]).abs().max() < 2e-6 * wanted[key].abs().max(), key


@pytest.mark.parametrize("name", RECIPES)
def test_rungs(name: str) -> None:
    """FP8 forward with a backward in bf16 has FP8's output and bf16's gradients; the last rung is the plain layer."""
    linear, numerics = build(RECIPES[name]())
    x, grad = operands()
    plain = copy.deepcopy(linear)
    plain.__class__ = Linear
    fp8, bf16 = results(linear, x, grad), results(plain, x, grad)
    assert not torch.equal(fp8["y"], bf16["y"])
    if "fp8_forward" in numerics.rungs:
        numerics.rung = "fp8_forward"
        found = results(linear, x, grad)
        assert torch.equal(found["y"], fp8["y"])
        for key in ("dx", "dw"):
            assert torch.equal(found[key], bf16[key])
    else:
        with pytest.raises(ValueError, match="fp8_forward"):
            numerics.rung = "fp8_forward"
    numerics.rung = "bf16"
    assert all(torch.equal(found, bf16[key]) for key, found in results(linear, x, grad).items())


@pytest.mark.parametrize("name", RECIPES)
def test_a_micro_batch_without_tokens(name: str) -> None:
    linear, numerics = build(RECIPES[name]())
    for rung in numerics.rungs:
        numerics.rung = rung
        with numerics.micro_batch():
            found = results(linear, torch.zeros(2, 0, INPUTS).bfloat16(), torch.zeros(2, 0, OUTPUTS).bfloat16())
        assert [found[key].shape[1] for key in ("y", "dx", "dw")] == [0, 0, INPUTS]
        assert not found["dw"].any()
        assert not found["db"].any()
    assert all(tensor.isfinite().all() for tensor in numerics.tensors().values())


@pytest.mark.parametrize("name", RECIPES)
def test_observations(name: str) -> None:
    linear, numerics = build(RECIPES[name]())
    x, grad = operands()
    x[0, 0, 0], x[0, 1, 0] = torch.inf, 1e-30
    x[0, 2] = 0.0
    seen: list[Observation] = []
    with numerics.collect(seen.append):
        results(linear, x, grad)
    results(linear, x, grad)
    by_operand = {found.operand: found for found in seen}
    assert by_operand.keys() == {"input", "weight", "grad_output"}
    assert by_operand["input"].module == "layer"
    assert by_operand["input"].amax == torch.inf
    assert by_operand["weight"].amax == linear.weight.abs().max()
    assert by_operand["input"].overflow == pytest.approx(1 / x.numel())
    assert by_operand["grad_output"].overflow == 0
    assert 0 < by_operand["input"].underflow <= 1
    assert (by_operand["grad_output"].underflow > 0) == (name == "fp8_delayed")  # its first scale is 1


@pytest.mark.parametrize("keep", [False, True])
def test_a_weight_is_quantized_once_a_step_where_it_stays(keep: bool) -> None:
    """And never from a step before."""
    linear, numerics = build(RECIPES["fp8_block"]())
    x, grad = operands()
    counts: list[str] = []
    with numerics.collect(lambda found: counts.append(found.operand)):
        with numerics.step(keep_weights=keep):
            results(linear, x, grad)
            results(linear, x, grad)
        assert counts.count("weight") == (1 if keep else 4)
        with torch.no_grad():
            linear.weight.mul_(2.0)
        with numerics.step(keep_weights=keep):
            after = results(linear, x, grad)
    assert torch.equal(after["dx"], results(linear, x, grad)["dx"])


def test_a_failure_leaves_nothing_behind() -> None:
    _, numerics = build(RECIPES["fp8_delayed"]())
    with pytest.raises(ZeroDivisionError), numerics.step(keep_weights=True), numerics.micro_batch():
        _ = 1 / 0
    assert (numerics.mode.weights, numerics.histories.recording) == (None, False)


def test_one_scale_is_kept_for_backward() -> None:
    """Codes take a quarter of fp32's memory, and the weight is not copied."""
    linear, _ = build(RECIPES["fp8_current"]())
    saved: list[Tensor] = []
    x, _ = operands()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x.requires_grad_())
    assert sorted(t.element_size() for t in saved) == [1, 2, 4]
    assert any(t.data_ptr() == linear.weight.data_ptr() for t in saved)
