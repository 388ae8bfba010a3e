"""What one GPU can show: the same run as on the CPU, in the layouts of a single process. Skips itself without CUDA."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.checkpoint.opening import load_tensors
from megatron_lite.models.attention_kernel import MATH, attention_kernel
from tests import runs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def on_cpu(tiny_data, tmp_path, monkeypatch):
    """The same run on the CPU of this machine."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        runs.run(tiny_data, tmp_path / "cpu", "optim.lr=1e-3")
    return tmp_path / "cpu"


def test_fp32_follows_the_cpu(tiny_data, on_cpu, tmp_path):
    runs.run(tiny_data, tmp_path / "gpu", "optim.lr=1e-3")
    for gpu, cpu in zip(runs.curve(tmp_path / "gpu"), runs.curve(on_cpu), strict=True):
        assert gpu[:2] == cpu[:2]
        # other kernels add in another order: 1e-7 a step, which 20 steps of Adam enlarge
        assert gpu[2] == pytest.approx(cpu[2], rel=1e-4)


def test_initial_weights_are_the_cpus_bit_for_bit(tiny_data, tmp_path, monkeypatch):
    runs.run(tiny_data, tmp_path / "gpu", "optim.lr=1e-30", "train.stop_at=1", "optim.weight_decay=0")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        runs.run(tiny_data, tmp_path / "cpu", "optim.lr=1e-30", "train.stop_at=1", "optim.weight_decay=0")
    gpu = dict(load_tensors(tmp_path / "gpu" / "checkpoints" / "step_00000001"))
    cpu = dict(load_tensors(tmp_path / "cpu" / "checkpoints" / "step_00000001"))
    assert all(torch.equal(gpu[name], cpu[name]) for name in gpu if name.startswith("model.") and "norm" not in name)


@pytest.mark.parametrize(
    "overrides",
    [
        ["precision=bf16"],
        ["parallel.recompute=full"],
        ["parallel.recompute=selective"],
        ["parallel.compile=true"],
        ["engine=deepspeed", "engine.zero_stage=2"],
    ],
)
def test_every_single_process_layout_trains(tiny_data, on_cpu, tmp_path, overrides):
    if "engine=deepspeed" in overrides:
        pytest.importorskip("deepspeed", exc_type=ImportError)
    runs.run(tiny_data, tmp_path / "gpu", "optim.lr=1e-3", *overrides)
    # bf16 keeps 8 bits; the others stay far closer
    assert runs.curve(tmp_path / "gpu")[-1][2] == pytest.approx(runs.curve(on_cpu)[-1][2], rel=0.02)


def test_deterministic_resumes_to_the_same_bits(tiny_data, tmp_path):
    runs.run(tiny_data, tmp_path / "straight", "train.deterministic=true")
    runs.run(tiny_data, tmp_path / "stopped", "train.deterministic=true", "train.stop_at=9")
    runs.run(tiny_data, tmp_path / "stopped", "train.deterministic=true")
    assert runs.curve(tmp_path / "stopped") == runs.curve(tmp_path / "straight")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)  # bf16: 2^-8 of sums of 64
def test_the_chosen_attention_kernel_runs_and_is_right(dtype, tolerance, masked):
    """Forward and backward, with grouped heads."""
    draw = torch.Generator("cuda").manual_seed(0)
    inputs = [torch.randn(2, heads, 64, 32, generator=draw, device="cuda", dtype=dtype) for heads in (6, 2, 2)]
    mask = torch.ones(64, 64, device="cuda", dtype=torch.bool).tril()[None, None] if masked else None
    results = []
    for kernel in (attention_kernel("cuda", dtype, masked=masked), MATH):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = kernel(*leaves, mask=mask, is_causal=not masked)
        y.float().square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results):
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
