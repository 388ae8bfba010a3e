"""The distillation recipes: the published sizes, tokens and rates, at the layouts that they name."""

from __future__ import annotations

import pytest

from megatron_lite.models.flops import parameter_count
from megatron_lite.objectives.distillation import DistillationConfig
from megatron_lite.planner.memory import ERROR, OUTSIDE, memory
from megatron_lite.training.build import build_schedule, check_batch_sizes
from megatron_lite.training.config import compose_run, validate
from megatron_lite.training.planning import job_of
from megatron_lite.training.teacher import check_teacher
from tests.hf_folders import command

# parameters, tokens, batch x length, peak, minimum, warm-up; the published ones among them are marked in the configs
RECIPES = {
    "minitron_8b": (8_414_105_600, 380e9, 768 * 8192, 1e-4, 4.5e-7, 60),
    "minitron_8b_teacher": (12_247_782_400, 100e9, 768 * 8192, 2e-5, 4.5e-7, 120),
    "nemotron4_minitron_8b": (8_271_699_968, 94e9, 1152 * 4096, 2e-4, 4.5e-7, 60),
    "nemotron4_minitron_4b": (4_190_509_056, 94e9, 1152 * 4096, 2e-4, 4.5e-7, 60),
    "nano2_9b_base": (8_888_227_328, 480e9, 736 * 8192, 9e-5, 4.5e-6, 60),
    "nano2_9b_reasoning_depth": (None, 60e9, 736 * 8192, 9e-5, 4.5e-6, 60),
    "nano2_9b_reasoning": (8_888_227_328, 50e9, 736 * 8192, 9e-5, 4.5e-6, 60),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe(name: str, capsys: pytest.CaptureFixture) -> None:
    parameters, tokens, batch, peak, least, warm_up = RECIPES[name]
    run = compose_run([f"experiment={name}"])
    validate(run, 32 * 8)
    assert run.run.name == name
    schedule = build_schedule(run)
    check_batch_sizes(run, schedule, world_size=32 * 8)
    assert run.train.global_batch_size * run.data.seq_len == batch
    assert 0 <= schedule.end.consumed_tokens - tokens < batch
    assert (run.optim.lr, run.schedule.min_lr, run.schedule.warmup_steps) == (peak, least, warm_up)
    assert run.schedule.name == "cosine"
    assert run.init_from.model == "config"  # the pruned model must have exactly these sizes
    if parameters:
        assert parameter_count(run.model) == parameters
    if name == "minitron_8b_teacher":
        assert not isinstance(run.objective, DistillationConfig)
        return
    assert (run.objective.temperature, run.objective.cross_entropy) == (1.0, 0.0)
    assert (
        "teacher" in run.objective.teacher or "nemotron4_15b" in run.objective.teacher or "12b" in run.objective.teacher
    )


def test_the_stages_of_the_reasoning_model_cut_depth_first() -> None:
    teacher, deep, wide = (
        compose_run([word]).model
        for word in ("model=nemotron_nano2_12b", "experiment=nano2_9b_reasoning_depth", "experiment=nano2_9b_reasoning")
    )
    assert [len(model.symbols) for model in (teacher, deep, wide)] == [62, 56, 56]
    assert (deep.hidden_size, deep.mlp.ffn_size) == (teacher.hidden_size, teacher.mlp.ffn_size) == (5120, 20480)
    assert (wide.hidden_size, wide.mlp.ffn_size) == (4480, 15680)


# parameters, tokens, length, batch, cp, learning rate, start
LONG = {
    "nano2_12b_long": (12_310_001_152, 18.9e9, 524_288, 12, 16, "runs/nano2_12b"),
    "nano2_9b_reasoning_49k": (8_888_227_328, 25e9, 49_152, 128, 2, "runs/nano2_9b_reasoning"),
    "nano2_9b_reasoning_262k": (8_888_227_328, 1e9, 262_144, 24, 8, "runs/nano2_9b_reasoning_49k"),
}


@pytest.mark.parametrize("name", LONG)
def test_a_recipe_for_long_sequences(name: str) -> None:
    parameters, tokens, length, batch, cp, start = LONG[name]
    run = compose_run([f"experiment={name}"])
    world_size = 8 * cp * 4
    validate(run, world_size)
    schedule = build_schedule(run)
    check_batch_sizes(run, schedule, world_size=world_size)
    assert (run.run.name, run.init_from.path, run.init_from.model) == (name, start, "config")
    assert (run.data.seq_len, run.train.global_batch_size, run.parallel.tp, run.parallel.cp) == (length, batch, 8, cp)
    assert parameter_count(run.model) == parameters
    assert 0 <= schedule.end.consumed_tokens - tokens < batch * length
    rates = {schedule.lr(step, 0) for step in (1, 2, 100)}
    assert rates == {4.5e-6}
    assert isinstance(run.objective, DistillationConfig) == name.startswith("nano2_9b")
    if isinstance(run.objective, DistillationConfig):
        check_teacher(run, compose_run(["model=nemotron_nano2_12b"]).model, named="the 12B")


def test_a_fifth_of_the_long_phase_is_long_documents() -> None:
    before, run = (compose_run([f"experiment=nano2_12b{end}"]).data for end in ("", "_long"))
    assert {source.min_document_tokens for source in run.groups["long"].sources.values()} == {32_769}
    (phase,) = run.phases
    assert phase.weights.pop("long") == 0.2
    assert phase.weights == pytest.approx({name: 0.8 * weight for name, weight in before.phases[-1].weights.items()})


def test_environment_variables_name_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDENT", "/models/student")
    monkeypatch.setenv("TEACHER", "/models/teacher")
    run = compose_run(["experiment=minitron_8b"])
    assert (run.init_from.path, run.objective.teacher) == ("/models/student", "/models/teacher")


def test_a_recipe_can_be_planned(capsys: pytest.CaptureFixture) -> None:
    assert command("plan", "model=minitron_8b", "parallel.tp=8", "seq_len=8192") == 0
    assert "8,414,105,600 parameters" in capsys.readouterr().out


# experiment -> GPUs, teacher, whether its scans are planned by kernels, which takes a tenth of the time
PLANNED = {
    "nemotron4_15b": (768, None, True),
    "nano2_12b": (256, None, True),
    "nano2_12b_long": (512, None, True),
    "minitron_8b_teacher": (256, None, True),
    "minitron_8b": (256, "mistral_nemo_12b", True),
    "nemotron4_minitron_8b": (256, "nemotron4_15b", True),
    "nano2_9b_reasoning_depth": (256, "nemotron_nano2_12b", True),  # the largest of these that learn at 8,192 tokens
    "nano2_9b_reasoning_49k": (256, "nemotron_nano2_12b", True),
    "nano2_9b_reasoning_262k": (256, "nemotron_nano2_12b", True),
    "nano2_12b without kernels": (256, None, False),
    "hymba_1p5b": (128, None, False),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if PLANNED[n][2] else pytest.mark.slow) for n in PLANNED])
def test_a_recipe_fits_gpus_of_80_gb(name: str) -> None:
    """By the plan's numbers, and if they are off by what they may be."""
    gpus, teacher, kernels = PLANNED[name]
    run = compose_run([f"experiment={name.partition(' ')[0]}"])
    model = None if teacher is None else compose_run([f"model={teacher}"]).model
    planned = memory(job_of(run, gpus, teacher=model, scan_kernels=kernels)).total
    assert planned * (1 + ERROR) + OUTSIDE < 80e9
