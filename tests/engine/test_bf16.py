"""bf16 on several ranks computes what one process computes: the same float tables, the same sums, the same fp32 parameters.

With the same micro-batches a data-parallel layout does the same bf16 arithmetic as one process, and adds up fp32 gradients in another
order, which is 1e-7. A tensor-parallel one rounds partial sums to bf16: it is compared with one process that rounds the same sums.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.models import attention, rope
from megatron_lite.models.initialization import Distribution, Normal
from megatron_lite.models.layers import LAYER_TYPES
from megatron_lite.models.mlp import MLP
from megatron_lite.objectives import base as objectives
from tests.distributed import run_ranks
from tests.engine import harness
from tests.engine.harness import Case

# Samples of a step, their length, whether some tokens do not count in the loss.
Work = tuple[int, int, bool]
SHORT: Work = (4, 256, True)

# What a rank reports: losses, gradient norms, and (dtype, hash) of every rotary table that a layer used in the first step.
Report = tuple[list[float], list[float], list[tuple[str, str]]]


def zero(stage: int) -> dict[str, object]:
    return {"kind": "deepspeed", "zero_stage": stage}


LAYOUTS: dict[str, tuple[int, Case]] = {
    "full": (2, Case(precision="bf16")),
    "optimizer": (2, Case(engine={"shard": "optimizer"}, precision="bf16")),
    "none": (2, Case(engine={"shard": "none"}, precision="bf16")),
    "zero 1": (2, Case(engine=zero(1), precision="bf16")),
    "zero 2": (2, Case(engine=zero(2), precision="bf16")),
    "zero 3": (2, Case(engine=zero(3), precision="bf16")),
    "hsdp": (4, Case({"dp_replicate": 2}, precision="bf16")),
}
SEQUENCE = {"tp": 2, "sequence_parallel": True}


def batches(step: int, work: Work, rank: int, ranks: int) -> list[dict[str, Tensor]]:
    """One sample a micro-batch, so that every layout has the same ones."""
    samples, length, masked = work
    share = samples // ranks
    found = []
    for index in range(rank * share, (rank + 1) * share):
        sample = harness.sample(step, index, length)
        if not masked:
            sample["loss_mask"] = torch.ones_like(sample["loss_mask"])
        found.append({key: value[None] for key, value in sample.items()})
    return found


def train(rank: int, world_size: int, case: Case, work: Work, steps: int) -> Report:
    engine, place, places = harness.open_engine(case, world_size)
    harness.move_off_zero(engine)
    tables: list[tuple[str, str]] = []
    losses, norms = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rope, "apply_rotary", partial(watched_rotary, tables, rope.apply_rotary))
        for step in range(1, steps + 1):
            result = engine.train_step(batches(step, work, place, places), lr=harness.PEAK)
            losses.append(result.loss.item())
            norms.append(result.grad_norm.item())
            patch.undo()
    return losses, norms, tables


def watched_rotary(tables: list[tuple[str, str]], right: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    bits = torch.stack([cos, sin]).view(torch.uint8).numpy().tobytes()
    tables.append((str(cos.dtype), hashlib.sha256(bits).hexdigest()))
    return right(x, cos, sin)


@cache
def one_process(work: Work, steps: int) -> Report:
    return train(0, 1, sized(Case(precision="bf16"), work), work, steps)


def sized(case: Case, work: Work) -> Case:
    """Two blocks for short sequences, one for long ones, which take seconds."""
    return replace(case, model={"num_layers": 2 if work[1] == 256 else 1})


def check_layout(name: str, work: Work, steps: int) -> None:
    world_size, case = LAYOUTS[name]
    reports = run_ranks(world_size, train, sized(case, work), work, steps)
    losses, norms, tables = one_process(work, steps)
    for got in reports:
        assert got[0] == pytest.approx(losses, rel=1e-5)
        assert got[1] == pytest.approx(norms, rel=1e-5)
    assert {dtype for dtype, _ in tables} == {"torch.float32"}
    # in order of rank, which is that of the samples
    assert [table for _, _, seen in reports for table in seen] == tables


@pytest.mark.parametrize("name", LAYOUTS)
def test_data_parallel_as_one_process(name: str) -> None:
    check_layout(name, SHORT, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_data_parallel_at_4096_tokens(name: str) -> None:
    """Where positions have 12 bits, of which bf16 keeps 8."""
    check_layout(name, (LAYOUTS[name][0], 4096, True), 1)


# ---------------------------------------------------------------- tensor parallelism


def row_in_halves(layer: nn.Module, x: Tensor) -> Tensor:
    """A row-parallel layer's sum: each half of the input features rounded to bf16, then added."""
    half = x.shape[-1] // 2
    weight: Any = layer.weight
    y = F.linear(x[..., :half], weight[:, :half]) + F.linear(x[..., half:], weight[:, half:])
    return y if layer.bias is None else y + layer.bias


def column_in_halves(layer: nn.Module, x: Tensor) -> Tensor:
    """A column-parallel layer: the two halves' gradients of x are rounded, then added."""
    weight: Any = layer.weight
    bias: Any = layer.bias
    parts = zip(weight.chunk(2), [None] * 2 if bias is None else bias.chunk(2))
    return torch.cat([F.linear(x, *part) for part in parts], dim=-1)


def loss_in_halves(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, mask_N: Tensor, **keys: Any) -> Tensor:
    """The vocabulary-parallel loss: as a column-parallel layer."""
    logits_NV = torch.cat([F.linear(x_ND, half) for half in weight_VD.chunk(2)], dim=-1).float()
    losses_N = F.cross_entropy(logits_NV[:, : keys["shard"].vocab_size], targets_N, reduction="none")
    return losses_N.masked_fill(~mask_N, 0.0).sum()


@cache
def emulated(work: Work) -> Report:
    """One process that rounds what two tensor-parallel ranks round."""
    with pytest.MonkeyPatch.context() as patch:
        for cls, rows, columns in ((attention.Attention, ["out"], ["qkv"]), (MLP, ["down"], ["up"])):
            patch.setattr(cls, "__init__", init_in_halves(cls.__init__, rows, columns))
        patch.setattr(objectives, "cross_entropy_sum", loss_in_halves)
        return train(0, 1, sized(Case(precision="bf16"), work), work, 1)


def init_in_halves(right: Any, rows: list[str], columns: list[str]) -> Any:
    def init(module: nn.Module, *args: Any) -> None:
        right(module, *args)
        for names, forward in ((rows, row_in_halves), (columns, column_in_halves)):
            for name in names:
                layer = module.get_submodule(name)
                layer.forward = partial(forward, layer)

    return init


@pytest.mark.parametrize("parallel", [{"tp": 2}, SEQUENCE], ids=["tp", "sequence parallel"])
def test_tensor_parallel_rounds_partial_sums_and_nothing_else(parallel: dict[str, Any]) -> None:
    check_tensor_parallel(parallel, (4, 256, False))


@pytest.mark.slow
def test_tensor_parallel_at_4096_tokens() -> None:
    check_tensor_parallel({"tp": 2}, (1, 4096, False))


def check_tensor_parallel(parallel: dict[str, Any], work: Work) -> None:
    """Every token counts: their number is then a power of two, and dividing by it rounds nothing, whether before a sum or after."""
    alone, rounded = one_process(work, 1), emulated(work)
    for losses, norms, tables in run_ranks(2, train, sized(Case(parallel, precision="bf16"), work), work, 1):
        assert losses == pytest.approx(alone[0], rel=5e-4)
        assert norms == pytest.approx(alone[1], rel=5e-4)
        assert tables == alone[2]
        assert losses == pytest.approx(rounded[0], rel=1e-5)
        assert norms == pytest.approx(rounded[1], rel=1e-5)


# ---------------------------------------------------------------- parameters that compute in fp32


class Scale(nn.Module):
    """x * weight, with a weight that must not be rounded."""

    compute_in_fp32 = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.seen or not torch.equal(self.seen[-1], self.weight):
            self.seen.append(self.weight.detach().clone())
        return (x.float() * self.weight).to(x.dtype)

    def initial(self) -> dict[str, Distribution]:
        return {"weight": Normal(1.0)}


class ScaledMLP(MLP):
    def __init__(self, config: Any, spec: Any) -> None:
        super().__init__(config)
        self.scale = Scale(config.hidden_size)

    def forward(self, x_BTD: Tensor, context: Any = None) -> tuple[Tensor, None]:
        return self.scale(super().forward(x_BTD)[0]), None


def train_scaled(rank: int, world_size: int, case: Case) -> tuple[list[float], list[float], list[Tensor]]:
    """Losses and norms of two steps, and the weight of one `Scale` as its forward saw it: in step 1, in step 2, in an evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LAYER_TYPES, "-", replace(LAYER_TYPES["-"], build=ScaledMLP))
        engine, place, places = harness.open_engine(case, world_size)
    losses, norms = [], []
    for step in (1, 2):
        result = engine.train_step(batches(step, (4, 32, True), place, places), lr=harness.PEAK)
        losses.append(result.loss.item())
        norms.append(result.grad_norm.item())
    engine.evaluate(batches(3, (4, 32, True), place, places)[0])
    return losses, norms, engine.objective.decoder.layers[1].mixer.scale.seen


@pytest.mark.parametrize("name", [*LAYOUTS, "zero 3, recompute", "full, recompute"])
def test_a_parameter_that_computes_in_fp32(name: str) -> None:
    world_size, case = LAYOUTS[name.split(",")[0]]
    if "recompute" in name:
        case = Case({"recompute": "full"}, case.engine, "bf16")
    losses, norms, seen = alone_scaled()
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[0].bfloat16().float())  # the test would see a rounded one
    for got in run_ranks(world_size, train_scaled, case):
        assert [weight.dtype for weight in got[2]] == [torch.float32] * 3
        assert torch.equal(got[2][0], seen[0])
        # DeepSpeed rounds the parts of this weight's gradient to bf16, as it does all gradients. Where they cancel, Adam's step of
        # 1e-3 notices (3e-5 was seen); the weight itself rounded would be off by up to 2^-9 |w|, 20 times the tolerance.
        rounding = 2e-4 if case.engine.get("kind") == "deepspeed" else 1e-5
        torch.testing.assert_close(torch.stack(got[2]), torch.stack(seen), rtol=0, atol=rounding)
        assert got[0] == pytest.approx(losses, rel=1e-5)
        assert got[1] == pytest.approx(norms, rel=1e-4)


@cache
def alone_scaled() -> tuple[list[float], list[float], list[Tensor]]:
    return train_scaled(0, 1, Case(precision="bf16"))
