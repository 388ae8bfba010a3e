"""The Transformer Engine backend, run on the CPU by TE's own Python over kernels in torch (`tests.transformer_engine_on_cpu`).

Those kernels and TE's choice of what is quantized when are written apart from our emulation. Both add up the same fp32 products in
the same order, so they agree to the last bit, and a difference is a mistake of one of them.
"""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_lite.precision import transformer_engine as backend
from megatron_lite.precision.emulated import EmulatedNumerics, Maxima
from megatron_lite.precision.recipes import (
    BlockScalingConfig,
    CurrentScalingConfig,
    DelayedScalingConfig,
    Fp8Config,
    MXScalingConfig,
)
from tests import runs
from tests.distributed import run_ranks
from tests.engine import harness
from tests.engine.harness import Case, Trace
from tests.engine.test_hybrid import HYBRID
from tests.training.test_ladder import PLANTED, SETTINGS, events, planted
from tests.transformer_engine_on_cpu import gpu, install, kernels, needs_wheel, transformer_engine_on_cpu

pytestmark = pytest.mark.slow

API = json.loads((Path(__file__).parents[1] / "gpu" / "transformer_engine_api.json").read_text())
GPUS = {"fp8_delayed": (8, 9), "fp8_current": (9, 0), "fp8_block": (9, 0), "mxfp8": (10, 0)}
LENGTH = {"fp8_delayed": {"amax_history_len": 4}}
NO_BIAS = {"linear_bias": False}  # TE adds it to bf16 results, the emulation to fp32 sums
# all sides are multiples of 32, and of 16 on two ranks
MAMBA = HYBRID | NO_BIAS | {"mamba.heads": 16, "mamba.head_dim": 4, "mamba.groups": 2, "mamba.state": 12}


def case(precision: str, backend: str, parallel: dict[str, Any] | None = None, **more: Any) -> Case:
    numbers = {"backend": backend, **LENGTH.get(precision, {}), **more.pop("numbers", {})}
    return Case(parallel or {}, precision=precision, numbers=numbers, **({"model": NO_BIAS} | more))


def both(
    rank: int, world_size: int, precision: str, parallel: dict[str, Any] | None = None, **more: Any
) -> list[Trace]:
    """The same training by the emulation and by TE."""
    names = ("emulated", "transformer_engine")
    return [harness.train(rank, world_size, case(precision, name, parallel, **more), steps=2) for name in names]


def same_bits(emulated: Trace, te: Trace) -> None:
    """The same bits on most CPUs. Where matrix products of transposed operands sum in another order (AVX2), a last digit differs."""
    assert te.losses == pytest.approx(emulated.losses, rel=1e-6)
    assert te.norms == pytest.approx(emulated.norms, rel=1e-5)
    for moment, boxes in emulated.boxes.items():
        assert boxes.keys() == te.boxes[moment].keys()  # the same names and shapes, amaxes too
        for name, (shape, offsets, tensor) in boxes.items():
            assert te.boxes[moment][name][:2] == (shape, offsets)
            assert torch.allclose(te.boxes[moment][name][2], tensor, rtol=1e-5, atol=1e-5), f"{moment}: {name}"


@pytest.fixture(scope="module")
def te():
    with transformer_engine_on_cpu() as module:
        yield module


@needs_wheel
@pytest.mark.parametrize("precision", GPUS)
def test_as_the_emulation(te, precision):
    with gpu(GPUS[precision]):
        same_bits(*both(0, 1, precision))  # four micro-batches a step: weights are quantized once
        if precision == "fp8_block":
            same_bits(*both(0, 1, precision, {"recompute": "full"}, model=MAMBA))


Layout = tuple[str, dict[str, Any], dict[str, Any]]
LAYOUTS: dict[str, Layout] = {
    "full, recompute": ("fp8_block", {"recompute": "full"}, {}),
    "tp, sequence parallel": ("fp8_delayed", {"tp": 2, "sequence_parallel": True}, {"micro_batch": 4}),
    "full": ("fp8_delayed", {}, {}),
    "nothing sharded": ("fp8_block", {"recompute": "selective"}, {"engine": {"shard": "none"}}),
    "optimizer": ("fp8_delayed", {}, {"engine": {"shard": "optimizer"}, "micro_batch": 1}),
    "tp, sequence parallel, hybrid": ("fp8_current", {"tp": 2, "sequence_parallel": True}, {"model": MAMBA}),
    "zero 3": ("fp8_current", {}, {"engine": {"kind": "deepspeed", "zero_stage": 3}}),
    "zero 1": ("fp8_delayed", {}, {"engine": {"kind": "deepspeed", "zero_stage": 1}}),
    "zero 2, tp": ("fp8_current", {"tp": 2}, {"engine": {"kind": "deepspeed", "zero_stage": 2}}),
}


@needs_wheel
def test_as_the_emulation_on_two_ranks():
    for traces in run_ranks(2, on_ranks):
        for name, (emulated, te) in zip(LAYOUTS, traces, strict=True):
            try:
                same_bits(emulated, te)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


def on_ranks(rank: int, world_size: int) -> list[list[Trace]]:
    undo = install()
    try:
        return [both(rank, world_size, name, parallel, **more) for name, parallel, more in LAYOUTS.values()]
    finally:
        undo()


WIDE = NO_BIAS | {"mlp.ffn_size": 256}  # a rank has whole blocks of the rows of `up`
GATHERED = {
    "fp8_current": {},
    "fp8_delayed": {"engine": {"shard": "optimizer"}},
    "fp8_block": {
        "parallel": {"recompute": "full"},
        "model": WIDE,
        "numbers": {"bf16_modules": ["*.qkv", "*.out", "*.down"]},
    },
}


@needs_wheel
def test_codes_that_were_gathered_are_what_te_would_quantize():
    for traces in run_ranks(2, gathered):
        for name, (bf16, fp8) in zip(GATHERED, traces, strict=True):
            same_bits(bf16, fp8)
            assert bf16.losses == fp8.losses, name


def gathered(rank: int, world_size: int) -> list[list[Trace]]:
    undo = install()
    try:
        return [
            [
                harness.train(
                    rank, world_size, dataclasses.replace(case, numbers=case.numbers | {"all_gather": how}), steps=2
                )
                for how in ("bf16", "fp8")
            ]
            for case in (case(name, "transformer_engine", **more) for name, more in GATHERED.items())
        ]
    finally:
        undo()


@needs_wheel
def test_weights_are_quantized_as_often_as_they_are_gathered():
    """Two layers have that shape; in forward and in backward of each micro-batch, or once in a step. By us where codes are gathered."""
    wanted = {("full", "bf16"): [4, 4], ("optimizer", "bf16"): [2, 0], ("full", "fp8"): [0, 0]}
    assert run_ranks(2, count_weights, list(wanted)) == [wanted, wanted]


def count_weights(rank: int, world_size: int, ways: list[tuple[str, str]]) -> dict[tuple[str, str], list[int]]:
    """How often TE quantizes the qkv weights in each of two micro-batches of the second step."""
    undo = install()
    try:
        return {(shard, gather): _counts(world_size, shard, gather) for shard, gather in ways}
    finally:
        undo()


def _counts(world_size: int, shard: str, gather: str) -> list[int]:
    sharded = case("fp8_current", "transformer_engine", engine={"shard": shard}, numbers={"all_gather": gather})
    engine, place, places = harness.open_engine(sharded, world_size)
    shape = engine.objective.decoder.layers[0].mixer.qkv.weight.shape
    counts: list[int] = []
    quantize, began = kernels.quantize, engine._begin_micro_batch

    def counting(x: torch.Tensor, quantizer: Any) -> Any:
        counts[-1] += x.shape == shape
        return quantize(x, quantizer)

    def begin(**settings: Any) -> None:
        counts.append(0)
        began(**settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "quantize", counting)
        patch.setattr(engine, "_begin_micro_batch", begin)
        for step in (1, 2):
            engine.train_step(harness.micro_batches(step, rank=place, ranks=places, size=2), lr=1e-3)
    return counts[-2:]


# ---------------------------------------------------------------- state


def start(precision: str = "fp8_delayed", name: str = "transformer_engine", **more: Any) -> Any:
    return harness.open_engine(case(precision, name, **more), 1)[0]


def step(engine: Any, number: int) -> tuple[float, float]:
    result = engine.train_step(harness.micro_batches(number, size=4), lr=1e-3)
    return result.loss.item(), result.grad_norm.item()


def copy_state(source: Any, target: Any) -> None:
    state = source.state()
    pieces = target.state().tensors
    assert pieces.keys() == state.tensors.keys()
    for name, piece in pieces.items():
        piece.tensor().copy_(state.tensors[name].tensor())
    target.load_state(dataclasses.replace(state, tensors=pieces))


@needs_wheel
def test_histories_continue_in_another_engine_of_either_backend(te):
    straight = start()
    trace = [step(straight, number) for number in (1, 2, 3)]
    both_ways = [("emulated", "transformer_engine"), ("transformer_engine", "emulated")]
    for first, then in [("transformer_engine", "transformer_engine"), *both_ways]:
        before, after = start(name=first), start(name=then)
        assert [step(before, number) for number in (1, 2)] == trace[:2]
        copy_state(before, after)
        assert step(after, 3) == trace[2]


@needs_wheel
def test_evaluation_and_observation_leave_no_trace(te):
    engine = start()
    step(engine, 1)
    numerics = engine.numerics
    state = {name: tensor.clone() for name, tensor in numerics.tensors().items()}
    batch = harness.micro_batches(2, size=4)[0]
    loss = engine.evaluate(batch)[0]
    observed = []
    with numerics.forward_only(), numerics.collect(observed.append):
        assert engine.objective(batch).total.requires_grad
    assert {(o.module, o.operand) for o in observed} >= {
        ("layers.0.mixer.qkv", "input"),
        ("layers.0.mixer.qkv", "weight"),
    }
    assert all(torch.equal(tensor, state[name]) for name, tensor in numerics.tensors().items())
    # TE by itself records what an evaluation quantizes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numerics, "forward_only", numerics._pass)
        assert engine.evaluate(batch)[0] == loss
    assert not all(torch.equal(tensor, state[name]) for name, tensor in numerics.tensors().items())


@needs_wheel
@pytest.mark.parametrize(("precision", "tolerance"), [("fp8_current", 1e-3), ("fp8_delayed", 0.0)])
def test_rungs(te, precision, tolerance):
    """tolerance: the backward of fp8_forward rounds sums to bf16, and here the two add them in another order."""
    engines = [start(precision, name) for name in ("emulated", "transformer_engine")]
    assert engines[0].numerics.rungs == engines[1].numerics.rungs
    traces = []
    for number, rung in enumerate(engines[0].numerics.rungs, start=1):
        for engine in engines:
            engine.numerics.rung = rung
        traces.append([step(engine, number) for engine in engines])
    assert traces[0][0] == traces[0][1]
    for emulated, te_result in traces[1:]:
        assert te_result == pytest.approx(emulated, rel=tolerance, abs=0)
    kept, kept_te = (engine.numerics.tensors() for engine in engines)  # a bf16 step leaves the histories as they are
    assert all(torch.equal(tensor, kept_te[name]) for name, tensor in kept.items())


@needs_wheel
def test_a_second_autocast_inside_would_advance_histories_twice(te):
    """Planted: TE forgets in which layer backward ends."""
    found = []
    for nested in (False, True):
        engine = start()
        for layer in engine.objective.decoder.layers if nested else ():
            if hasattr(layer.mixer, "qkv"):
                layer.mixer.qkv.multiply = in_autocast(te, engine.numerics, layer.mixer.qkv.multiply)
        step(engine, 1)
        found.append(engine.numerics.tensors()["amax_history_bwd.layers.1.mixer.up"].flatten().clone())
    assert (found[0] > 0).tolist() == [False, False, True, True]  # two micro-batches
    assert not torch.equal(found[0], found[1])


def in_autocast(te: Any, numerics: Any, multiply: Any) -> Any:
    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with te.autocast(enabled=True, recipe=numerics.recipes["fp8"]):
            return multiply(x, weight)

    return product


@needs_wheel
@pytest.mark.parametrize(
    ("precision", "rungs"),
    [("fp8_current", ["fp8", "fp8_forward", "fp8_forward", "bf16"]), ("fp8_delayed", ["fp8", "bf16"])],
)
def test_the_ladder(te, tiny_data, tmp_path, precision, rungs):
    """A run that overflows goes down as an emulated one does, and names the same module."""
    right = backend.TransformerEngineLinear.product

    def overflowing(self: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        observed = self.mode.observe is not None or self.mode.rung == "bf16"  # then it is the emulation's turn
        return right(self, x * factor[0] if self.path == PLANTED and not observed else x, bias)

    with planted() as factor, pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.TransformerEngineLinear, "product", overflowing)
        words = [f"precision={precision}", "precision.backend=transformer_engine"]
        assert runs.run(tiny_data, tmp_path / "r", *SETTINGS, *words) == 0
    found = events(tmp_path / "r")
    assert [(event["rung"], event["module"], event["operand"]) for event in found] == [
        (rung, PLANTED, "input") for rung in rungs
    ]


# ---------------------------------------------------------------- recipes and refusals


@needs_wheel
def test_every_number_reaches_te(te, monkeypatch):
    from transformer_engine.common import recipe as recipes

    def build(config: Fp8Config, rung: str = "fp8") -> Any:
        config.validate()
        return backend.build_recipe(config, recipes, rung=rung)

    delayed = build(DelayedScalingConfig(margin=2, amax_history_len=7, amax_compute="most_recent", format="e4m3"))
    assert (delayed.margin, delayed.amax_history_len, delayed.amax_compute_algo) == (2, 7, "most_recent")
    assert delayed.fp8_format is recipes.Format.E4M3
    assert build(DelayedScalingConfig()) == recipes.DelayedScaling()
    assert build(CurrentScalingConfig()) == recipes.Float8CurrentScaling()
    assert build(BlockScalingConfig()) == recipes.Float8BlockScaling()
    assert build(MXScalingConfig()) == recipes.MXFP8BlockScaling()
    assert build(CurrentScalingConfig(), "fp8_forward").backward_override == "high_precision"
    for config in (CurrentScalingConfig, BlockScalingConfig):
        for powers in (True, False):
            made = build(config(power_2_scales=powers))
            operands = (made.fp8_quant_fwd_inp, made.fp8_quant_fwd_weight, made.fp8_quant_bwd_grad)
            assert {operand.power_2_scale for operand in operands} == {powers}


@needs_wheel
@pytest.mark.parametrize("config", [CurrentScalingConfig, BlockScalingConfig])
def test_power_of_two_scales_reach_the_quantizers(te, config):
    """TE's constructor alone would not do it."""
    results = {
        powers: [*both(0, 1, config.name, numbers={"power_2_scales": powers}, micro_batch=8)]
        for powers in (True, False)
    }
    for pair in results.values():
        same_bits(*pair)
    assert results[True][1].losses != results[False][1].losses


def numerics(config: Fp8Config) -> Any:
    emulation = EmulatedNumerics(config, ["layers.0.mixer.qkv"], maxima=Maxima(), device=torch.device("cpu"))
    return backend.TransformerEngineNumerics(config, emulation)


@needs_wheel
@pytest.mark.parametrize(
    ("capability", "cuda", "config", "words"),
    [
        ((8, 0), "13.0", CurrentScalingConfig(), ["precision=fp8_current", "8.9", "precision=bf16", "emulated"]),
        ((8, 9), "13.0", BlockScalingConfig(), ["precision=fp8_block", "9.0", "precision=fp8_current", "emulated"]),
        ((9, 0), "12.8", BlockScalingConfig(), ["precision=fp8_block", "12.9", "precision=fp8_current"]),
        ((9, 0), "13.0", MXScalingConfig(), ["precision=mxfp8", "10.0", "precision=fp8_block"]),
        ((12, 0), "13.0", MXScalingConfig(), ["precision=mxfp8", "12.0", "precision=fp8_block"]),
        ((9, 0), "13.0", CurrentScalingConfig(amax="global"), ["precision.amax=global", "precision.amax=local"]),
    ],
)
def test_what_the_machine_lacks_is_refused(te, capability, cuda, config, words):
    with gpu(capability, cuda), pytest.raises(ValueError) as error:
        numerics(config)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "error", [ImportError("No module named 'transformer_engine'"), OSError("libcudart.so.13"), RuntimeError("empty")]
)
def test_a_missing_library_is_refused(error, monkeypatch):
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(backend.importlib, "import_module", fail)
    with pytest.raises(ValueError, match=r"transformer_engine.*pip install.*emulated"):
        numerics(CurrentScalingConfig())


def test_an_old_library_is_refused(monkeypatch):
    monkeypatch.setattr(backend.importlib, "import_module", lambda name: SimpleNamespace())
    with pytest.raises(ValueError, match=r"2\.20"):
        backend.load()


# ---------------------------------------------------------------- the API


PYTORCH, RECIPE = "transformer_engine.pytorch", "transformer_engine.common.recipe"
MODULES = {"te": PYTORCH, "self.te": PYTORCH, "recipe_module": RECIPE}
LINEAR = API["classes"]["transformer_engine.pytorch.Linear"]


def misfits(source: str) -> list[str]:
    """Every use of TE in a source file that the file of its API does not know: names, methods, parameters.

    `te` and `recipe_module` are TE's modules there, `linear` is a te.Linear.
    """
    tree, found, subclasses = ast.parse(source), [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in MODULES:
            name = f"{MODULES[ast.unparse(node.value)]}.{node.attr}"
            if name not in API["classes"] and name not in API["functions"]:
                found.append(name)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "linear":
            known = {*LINEAR["methods"], *LINEAR["attributes"], *LINEAR["properties"], "weight"}
            found += [] if node.attr in known else [f"Linear.{node.attr}"]
        elif isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "te.Linear" for base in node.bases):
            subclasses.add(node.name)
            overridden = {m.name for m in node.body if isinstance(m, ast.FunctionDef)}
            found += [f"Linear.{name}" for name in overridden - {*LINEAR["methods"], *LINEAR["properties"]}]
        elif isinstance(node, ast.Call):
            parameters = _parameters(ast.unparse(node.func))
            found += _refused(node, parameters) if parameters is not None else []
    assert subclasses == {"Linear"}
    return found


def _parameters(function: str) -> list[dict[str, str]] | None:
    """Of the function that a call names; None if it is not TE's."""
    if function == "linear":
        return LINEAR["methods"]["forward"]
    if function == "_linear_class(self.te)":
        return LINEAR["methods"]["__init__"]
    if function == "ask":  # te.is_fp8_available and the like
        return API["functions"]["transformer_engine.pytorch.is_mxfp8_available"]["parameters"]
    holder, _, name = function.rpartition(".")
    if holder == "linear":
        return LINEAR["methods"].get(name)
    full = f"{MODULES.get(holder)}.{name}"
    if full in API["classes"]:
        return API["classes"][full]["methods"]["__init__"]
    return API["functions"][full]["parameters"] if full in API["functions"] else None


def _refused(call: ast.Call, parameters: list[dict[str, str]]) -> list[str]:
    names = [parameter["name"] for parameter in parameters]
    given = {*names[: len(call.args)], *(keyword.arg for keyword in call.keywords)} - {None}  # None: **common
    wrong = [f"{ast.unparse(call.func)}({keyword})" for keyword in given - set(names)]
    if not any(keyword.arg is None for keyword in call.keywords):
        needed = {parameter["name"] for parameter in parameters if "default" not in parameter}
        wrong += [f"{ast.unparse(call.func)} without {name}" for name in needed - given]
    return wrong + (["too many arguments"] if len(call.args) > len(names) else [])


SOURCE = Path(backend.__file__).read_text()


def test_every_use_of_te_is_in_its_api():
    assert misfits(SOURCE) == []
    common = next(
        n for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "common"
    )
    keys = {key.value for key in common.value.keys}
    for name in ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"):
        fields = API["classes"][f"transformer_engine.common.recipe.{name}"]["methods"]["__init__"]
        assert keys <= {field["name"] for field in fields}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("self.te.autocast(enabled=True, recipe=", "self.te.autocast(enabled=True, fp8_recipe="),
        ("self.te.autocast(", "self.te.fp8_autocasts("),
        ("is_first_microbatch=", "first_microbatch="),
        ("bias=False, device=", "use_bias=False, device="),
        ("linear.init_fp8_metadata()", "linear.init_fp8_metadata(gemms=1)"),
        ("linear.fp8_meta[", "linear.fp8_metas["),
        ("amax_compute_algo=", "amax_compute="),
        ("use_f32_scales=", "use_fp32_scales="),
        ("def is_fsdp2(", "def is_fsdp("),
        ("ask(return_reason=True)", "ask(reason=True)"),
        ("te.is_fp8_block_scaling_available", "te.is_float8_block_scaling_available"),
    ],
)
def test_a_misspelled_use_is_found(right, wrong):
    assert right in SOURCE
    assert misfits(SOURCE.replace(right, wrong)) != []
