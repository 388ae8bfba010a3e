"""Distillation gives the same numbers on every layout and engine, those of whole logits in float64, and leaves its teacher alone."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_lite.checkpoint import CheckpointConfig, CheckpointStore
from megatron_lite.config.compose import to_dict
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.assemble import assemble, bare, seeded
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parallelize import Recipe
from megatron_lite.weights import load
from tests.distributed import run_ranks
from tests.engine import harness
from tests.engine.harness import Case, Trace
from tests.model_configs import model_config

# A hybrid of another width: another family than the student's, with a part that computes in fp32.
TEACHER: dict[str, Any] = {
    "family": "nemotron_h", "num_layers": None, "pattern": "M*-", "hidden_size": 48, "attention.heads": 8, "attention.kv_heads": 4,
    "attention.head_dim": 8, "mlp.ffn_size": 96, "vocab_size": harness.WORDS, "max_seq_len": harness.LENGTH,
    "mlp.activation": "squared_relu", "norm": "rmsnorm", "rope.fraction": 0.0, "mamba.heads": 8, "mamba.head_dim": 4,
    "mamba.groups": 4, "mamba.state": 8, "init_std": 0.2,
}  # fmt: skip
SEQUENCE = {"tp": 2, "sequence_parallel": True}
STEPS = 3
T = 2.0


def zero(stage: int) -> dict[str, object]:
    return {"kind": "deepspeed", "zero_stage": stage}


TWO: dict[str, Case] = {
    "dp, full": Case(engine={"shard": "full"}, micro_batch=1),
    "dp, nothing sharded": Case(engine={"shard": "none"}),
    "tp, sequence parallel, recompute": Case({**SEQUENCE, "recompute": "full"}, micro_batch=4),
    "zero 3": Case(engine=zero(3), micro_batch=1),
    "cp": Case({"cp": 2}, micro_batch=4),
}
TWO_MORE: dict[str, Case] = {
    "dp, optimizer, cpu offload": Case(engine={"shard": "optimizer", "cpu_offload": True}),
    "zero 1": Case(engine=zero(1)),
}
FOUR: dict[str, Case] = {
    "hsdp": Case({"dp_replicate": 2}),
    "dp x tp": Case(SEQUENCE, {"shard": "optimizer"}, micro_batch=1),
    "cp x tp": Case({"cp": 2, **SEQUENCE}, micro_batch=4),
    "zero 2 x tp": Case({"tp": 2}, zero(2)),
    "zero 3 x tp, sequence parallel": Case(SEQUENCE, zero(3)),
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, str]:
    """Checkpoints of a model and of one with tied embeddings, seeded with larger weights than a fresh one's, so that it is sure of
    its words."""
    home, made = tmp_path_factory.mktemp("teachers"), {}
    for name, changes in (("hybrid", {}), ("tied", {"tie_embeddings": True, "init_std": 0.1})):
        config = model_config(TEACHER | changes)
        decoder, _ = assemble(config, mesh=Mesh(), recipe=Recipe(), fill=seeded(3), wrap=bare)
        tensors = {f"model.{key}": value.detach() for key, value in decoder.named_parameters()}
        state = harness.manifest_state({"adam_step": 0}) | {"config": {"model": to_dict(config)}}
        CheckpointStore(home / name / "checkpoints", CheckpointConfig()).save(1, tensors, state)
        made[name] = str(home / name)
    return made


def with_teacher(case: Case, path: str, **settings: Any) -> Case:
    return Case(
        case.parallel, case.engine, case.precision, case.model, case.micro_batch,
        {"teacher": path, "temperature": T, "cross_entropy": 0.5, **settings},
    )  # fmt: skip


def train(rank: int, world_size: int, cases: list[Case]) -> list[tuple[Trace, bool, list[str]]]:
    """For each case the trace, whether nothing of the teacher stayed gathered or was changed, and what is trained."""
    results = []
    opened: list[Any] = []
    right = harness.open_engine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "open_engine", lambda *a: opened.append(right(*a)) or opened[-1])
        for case in cases:
            trace = harness.train(rank, world_size, case, steps=STEPS)
            engine = opened[-1][0]
            teacher = engine.objective.teacher
            parameters = list(teacher.parameters())
            sharded = case.engine.get("shard") != "none" and world_size // case.parallel.get("tp", 1) > 1
            kept = all(isinstance(parameter, DTensor) for parameter in parameters) or not sharded
            kept = kept and all(parameter.grad is None and not parameter.requires_grad for parameter in parameters)
            results.append((trace, kept, [name for name, _ in engine.objective.named_parameters()]))
    return results


def check(world_size: int, cases: dict[str, Case], path: str) -> None:
    [(reference, _, names)] = train(0, 1, [with_teacher(Case(micro_batch=4), path)])
    assert all(name.startswith("decoder.") for name in names)
    of_ranks = run_ranks(world_size, train, [with_teacher(case, path) for case in cases.values()])
    for number, name in enumerate(cases):
        traces = [results[number][0] for results in of_ranks]
        assert harness.differences([reference], traces) == [], name
        for trace in traces:
            for got, wanted in zip(trace.parts, reference.parts):
                assert got == pytest.approx(wanted, rel=harness.TOLERANCE), name
        assert all(results[number][1] for results in of_ranks), name


def test_as_one_process(teachers) -> None:
    check(2, TWO, teachers["hybrid"])


@pytest.mark.slow
def test_more_as_one_process(teachers) -> None:
    check(2, TWO_MORE, teachers["hybrid"])
    check(4, FOUR, teachers["hybrid"])
    check(4, {name: FOUR[name] for name in ("dp x tp", "zero 3 x tp, sequence parallel")}, teachers["tied"])


def dense(student: Decoder, teacher: Decoder, batches: list[dict[str, Tensor]], weight: float) -> dict[str, Tensor]:
    """Means over the counted tokens of a global batch from whole logits in float64, and the gradient's norm."""
    student, teacher = (deepcopy(model).double() for model in (student, teacher))
    logits, targets = [], []
    for batch in batches:
        mask = batch["loss_mask"]
        logits.append([model(batch["tokens"], batch["documents"])[mask] for model in (student, teacher)])
        targets.append(batch["targets"][mask])
    ours, theirs = (torch.cat(side) for side in zip(*logits))
    theirs, target = theirs.detach(), torch.cat(targets)
    p, log_q = F.softmax(theirs / T, -1), F.log_softmax(ours / T, -1)
    kl = (p * (p.log() - log_q)).sum(-1).mean()
    ce, teacher_ce = F.cross_entropy(ours, target), F.cross_entropy(theirs, target)
    loss = T**2 * kl + weight * ce
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in student.parameters()]).norm()
    return {"loss": loss.detach(), "grad_norm": norm, "kl": kl.detach(), "ce": ce.detach(), "teacher_ce": teacher_ce}


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_as_whole_logits_in_float64(weight: float, teachers) -> None:
    case = with_teacher(Case(micro_batch=3), teachers["hybrid"], cross_entropy=weight)
    engine, _, _ = harness.open_engine(case, 1)
    harness.move_off_zero(engine)
    batches = harness.micro_batches(1, size=3)
    wanted = dense(engine.objective.decoder, load(teachers["hybrid"])[0], batches, weight)
    validated = sum(engine.evaluate(batch)[0] for batch in batches)
    result = engine.train_step(batches, lr=0.0)
    got = {"loss": result.loss, "grad_norm": result.grad_norm, **result.parts}
    for name, value in wanted.items():  # fp32 through five layers and a scan
        assert got[name].item() == pytest.approx(value.item(), rel=1e-5), name
    assert validated / result.valid_tokens == pytest.approx(result.parts["ce"].item(), rel=1e-6)
    assert wanted["kl"] > 0.2  # the teacher is sure enough of its words to be learned from


def in_bf16(rank: int, world_size: int, cases: list[Case]) -> list[tuple[list[float], set[torch.dtype]]]:
    found = []
    for case in cases:
        engine, place, places = harness.open_engine(case, world_size)
        batches = harness.micro_batches(1, rank=place, ranks=places, size=1)
        result = engine.train_step(batches, lr=1e-3)
        dtypes = {parameter.dtype for parameter in engine.objective.teacher.parameters()}
        found.append(([value.item() for value in (result.loss, *result.parts.values())], dtypes))
    return found


def test_the_teacher_has_a_precision_of_its_own(teachers) -> None:
    """Kept in bf16, but for what computes in fp32, it moves the numbers by rounding and is the same on every layout."""
    path = teachers["hybrid"]
    cases = [with_teacher(Case(engine=engine), path, teacher_precision="bf16") for engine in ({}, zero(3))]
    cases.append(with_teacher(Case(precision="bf16"), path, teacher_precision="fp32"))
    [(exact, _)] = in_bf16(0, 1, [with_teacher(Case(), path)])
    alone = in_bf16(0, 1, [cases[0], cases[0], cases[2]])
    assert [dtypes for _, dtypes in alone] == [{torch.bfloat16, torch.float32}] * 2 + [{torch.float32}]
    for results in run_ranks(2, in_bf16, cases):
        for (got, dtypes), (wanted, same) in zip(results, alone):
            assert dtypes == same
            assert got == pytest.approx(wanted, rel=2e-5)
            assert got == pytest.approx(exact, rel=2e-2)  # 8 bits
    assert alone[0][0] != exact
    assert alone[2][0][-1] == pytest.approx(exact[-1], rel=1e-6)  # an fp32 teacher of a bf16 student


def test_a_teacher_that_is_left_gathered_is_noticed(teachers) -> None:
    """The planted bug of `check`: FSDP2 keeps what its root holds gathered unless it is told otherwise."""
    [kept, _] = run_ranks(2, forgetful, with_teacher(Case(), teachers["tied"]))
    assert not kept


def forgetful(rank: int, world_size: int, case: Case) -> bool:
    from torch.distributed.fsdp import FSDPModule

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FSDPModule, "reshard", lambda self: None)
        [(_, kept, _)] = train(rank, world_size, [case])
    return kept
