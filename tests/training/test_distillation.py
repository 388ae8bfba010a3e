"""Distillation as a run: from a teacher on disk, with its identity in every checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.data.tokenizer import train_tokenizer
from megatron_lite.training.config import compose_run, validate
from tests import hf_folders, runs

# another family and width than the teacher's
STUDENT = [
    "model.family=llama",
    "model.norm=rmsnorm",
    "model.mlp.activation=swiglu",
    "model.hidden_size=24",
    "model.num_layers=1",
]


def distill(data: Path, run_dir: Path, teacher: Path, *overrides: str) -> int:
    return runs.run(data, run_dir, "objective=distillation", f"objective.teacher={teacher}", *STUDENT, *overrides)


@pytest.fixture(scope="module")
def distilled(tiny_data: Path, straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 20 steps, whose teacher is `straight`; not to be changed."""
    directory = tmp_path_factory.mktemp("distilled") / "r"
    assert distill(tiny_data, directory, straight, "train.eval_every=10") == 0
    return directory


def test_the_student_comes_near_its_teacher(distilled: Path) -> None:
    rows = runs.rows(distilled)
    assert rows[-1]["kl"] < 0.6 * rows[0]["kl"]
    assert rows[0]["loss"] == rows[0]["kl"]  # at temperature 1, without cross-entropy
    assert rows[-1]["teacher_ce"] < rows[-1]["ce"] < rows[0]["ce"]


def test_validation_is_the_cross_entropy_of_the_student(distilled: Path, capsys: pytest.CaptureFixture) -> None:
    lines = [json.loads(line) for line in (distilled / "metrics.jsonl").read_text().splitlines()]
    logged = [line["val_loss"] for line in lines if "val_loss" in line][-1]
    assert hf_folders.command("evaluate", f"checkpoint={distilled}", "json=true") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["val_loss"] == logged


def test_a_resume_is_exact_wherever_the_teacher_is_now(
    tiny_data: Path, straight: Path, distilled: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(straight, tmp_path / "moved")
    assert distill(tiny_data, tmp_path / "r", straight, "train.stop_at=7") == 0
    assert distill(tiny_data, tmp_path / "r", moved) == 0
    assert runs.curve(tmp_path / "r") == runs.curve(distilled)
    last = "checkpoints/step_00000020"
    assert runs.digest(tmp_path / "r" / last) == runs.digest(distilled / last)
    said, before = (read_manifest(directory / last)["teacher"] for directory in (tmp_path / "r", distilled))
    assert said["identity"] == before["identity"]
    assert said["path"] == str(moved / last)


def test_another_teacher_is_refused(
    tiny_data: Path, straight: Path, distilled: Path, copy_of: Any, capsys: pytest.CaptureFixture
) -> None:
    """Also an older checkpoint of the same run, which is another model, and none."""
    run_dir, other = copy_of(distilled), straight / "checkpoints" / "step_00000012"
    with pytest.raises(ValueError, match=r"objective\.teacher=.*step_00000012.*resume_allow=\[objective\.teacher\]"):
        distill(tiny_data, run_dir, other, "train.max_steps=21")
    with pytest.raises(ValueError, match=r"has no teacher.*objective\.teacher=.*resume_allow=\[objective\.teacher\]"):
        runs.run(tiny_data, run_dir, *STUDENT, "train.max_steps=21")
    changed = ["resume_allow=[objective.teacher]", "objective.temperature=2"]
    assert distill(tiny_data, run_dir, other, "train.max_steps=21", *changed) == 0
    assert "from here on objective.temperature=2.0 (1.0 in the checkpoint)" in capsys.readouterr().out
    assert read_manifest(run_dir / "checkpoints" / "step_00000021")["teacher"]["path"] == str(other)


def test_a_hugging_face_folder_teaches(tiny_data: Path, tmp_path: Path) -> None:
    folder = hf_folders.make_folder(tmp_path / "hf", "nemotron", tokenizer=tiny_data / "tokenizer")
    assert distill(tiny_data, tmp_path / "r", folder, "train.stop_at=4") == 0
    weights = next(folder.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"objective\.teacher="):
        distill(tiny_data, tmp_path / "r", folder)
    for file in (tiny_data / "tokenizer").iterdir():
        (folder / file.name).unlink()
    with pytest.raises(ValueError, match=r"objective\.teacher=.*tokenizer"):
        distill(tiny_data, tmp_path / "fresh", folder)
    assert not (tmp_path / "fresh").exists() or not list((tmp_path / "fresh").glob("checkpoints/*"))


def test_what_does_not_belong_together(tiny_data: Path, straight: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    folder = hf_folders.make_folder(other, "llama")
    train_tokenizer(iter(["other words of another language"] * 20), other, vocab_size=270)
    for teacher, words, says in (
        (folder, [], r"objective\.teacher=.*was trained with tokenizer"),
        (straight, ["model.vocab_size=400"], r"objective\.teacher=.*384 words, but model\.vocab_size makes 400"),
        (straight, ["model.vocab_multiple=256"], r"objective\.teacher=.*model\.vocab_multiple.*512"),
        (straight, ["data.seq_len=4096", "model.max_seq_len=4096"], r"objective\.teacher=.*2048.*data\.seq_len=4096"),
        (tmp_path / "nothing", [], r"objective\.teacher: .*nothing does not exist"),
    ):
        with pytest.raises(ValueError, match=says):
            distill(tiny_data, tmp_path / "r", teacher, *words)
    assert not list((tmp_path / "r").glob("c*"))  # neither checkpoints nor config.yaml
    with pytest.raises(ValueError, match=r"objective\.teacher: .*nothing does not exist"):
        distill(tiny_data, tmp_path / "r", tmp_path / "nothing", f"data.random_corpus={tmp_path / 'random'}")
    assert not (tmp_path / "random").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], r"objective\.teacher"),
        (["objective.teacher="], r"objective\.teacher is empty"),
        (["objective.temperature=0"], r"objective\.temperature=0"),
        (["objective.temperature=inf"], r"objective\.temperature=inf"),
        (["objective.cross_entropy=-0.1"], r"objective\.cross_entropy=-0\.1"),
        (["objective.teacher_precision=fp8"], r"objective\.teacher_precision=fp8.*fp32, bf16"),
    ],
)
def test_settings_that_mean_nothing(words: list[str], says: str) -> None:
    teacher = [] if not words or words[0].startswith("objective.teacher=") else ["objective.teacher=x"]
    with pytest.raises(ValueError, match=says):
        validate(compose_run(["experiment=smoke", "objective=distillation", *teacher, *words]), world_size=1)
