"""What the DeepSpeed engine refuses, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.engine.deepspeed import DeepSpeedConfig
from tests.distributed import run_ranks
from tests.engine import harness
from tests.engine.harness import Case


@pytest.mark.parametrize("stage", [0, 4])
def test_unknown_stage(stage: int) -> None:
    with pytest.raises(ValueError, match=f"engine.zero_stage={stage}.*1, 2 or 3"):
        DeepSpeedConfig(zero_stage=stage).validate()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"pip install 'megatron-lite\[deepspeed\]'"):
        DeepSpeedConfig().validate()


def test_a_library_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Older ones look for nvcc when they are imported on a machine with a GPU."""
    (tmp_path / "deepspeed.py").write_text("raise OSError('CUDA_HOME does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    with pytest.raises(ValueError, match=r"engine=deepspeed.*OSError: CUDA_HOME.*engine=fsdp"):
        DeepSpeedConfig().validate()


def refused(rank: int, world_size: int) -> str:
    try:
        harness.open_engine(Case({"dp_replicate": 2}, {"kind": "deepspeed"}), world_size)
    except ValueError as error:
        return str(error)
    return ""


def test_replicas_are_refused() -> None:
    for text in run_ranks(2, refused):
        assert "parallel.dp_replicate=2" in text
        assert "engine=fsdp" in text


def losses(rank: int, world_size: int, case: Case) -> list[float]:
    return harness.train(rank, world_size, case, steps=3).losses


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_odd_number_of_elements(stage: int) -> None:
    model = {"hidden_size": 33, "norm": "rmsnorm"}
    alone = harness.train(0, 1, Case(model=model), steps=3).losses
    for found in run_ranks(2, losses, Case(engine={"kind": "deepspeed", "zero_stage": stage}, model=model)):
        assert found == pytest.approx(alone, rel=harness.TOLERANCE)


@pytest.mark.slow
def test_nothing_loads_it_unasked_and_nothing_is_compiled_or_said() -> None:
    """In a process of its own, without a compiler on the path and without a launcher's variables."""
    code = (
        "import sys; from tests.engine import harness; assert 'deepspeed' not in sys.modules; "
        "trace = harness.train(0, 1, harness.Case(engine={'kind': 'deepspeed', 'zero_stage': 3}), steps=2); "
        "print(len(trace.losses))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": "/nowhere", "PYTHONPATH": "."},
    )
    assert done.stdout == "2\n", done.stderr
    assert done.stderr == ""
