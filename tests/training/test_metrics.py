from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch

from megatron_lite import hardware
from megatron_lite.engine.base import StepResult
from megatron_lite.hardware import Peak, device_peak_flops
from megatron_lite.optim.schedule import Progress
from megatron_lite.training.metrics import Metrics, Work, memory_gib


def result(loss: float, norm: float = 1.0, tokens: int = 16, skipped: bool = False) -> StepResult:
    return StepResult(torch.tensor(loss), torch.tensor(norm), torch.tensor(tokens), torch.tensor(skipped))


def at(step: int, samples: int, seq_len: int = 8) -> Progress:
    return Progress(step, samples, samples * seq_len)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def work(**changes: object) -> Work:
    values: dict = {
        "flops_per_token": 6e9,
        "seq_len": 8,
        "devices": 4,
        "peak": Peak(1e12, "test"),
        "device": torch.device("cpu"),
    }
    return Work(**{**values, **changes})


def test_a_row_has_the_promised_keys_and_the_formula_of_mfu() -> None:
    clock = Clock()
    meter = Metrics(work(), clock=clock)
    clock.now += 0.5
    row = meter.update(result(5.25, 0.5), at=at(1, 2), lr=1e-3)
    assert row is not None
    memory = row.pop("memory_gib")
    assert 0.01 < memory < 1000
    # 2 samples of 8 tokens in 0.5 s: 32 tokens/s * 6e9 FLOPs / 4 devices = 4.8e10 FLOP/s each, of 1e12.
    assert row == {
        "step": 1,
        "consumed_samples": 2,
        "consumed_tokens": 16,
        "loss": 5.25,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "step_seconds": 0.5,
        "tokens_per_second": 32.0,
        "tflops_per_device": pytest.approx(0.048, rel=1e-12),
        "mfu": pytest.approx(0.048, rel=1e-12),
    }
    json.dumps(row)


def test_on_a_gpu_building_does_not_count_as_peak_and_retries_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    resets, retries = [], iter([0, 0, 3])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30 * (2 - len(resets)))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": next(retries)})
    meter = Metrics(work(device=torch.device("cuda", 0)), clock=Clock())
    rows = [meter.update(result(1.0), at=Progress(step, step), lr=1e-3) for step in (1, 2, 3)]
    assert [row and row["memory_gib"] for row in rows] == [2.0, 1.0, 1.0]
    assert [row and row.get("allocation_retries") for row in rows] == [None, None, 3]


def test_parts_of_the_loss_are_averaged_over_tokens_and_named_in_the_row() -> None:
    meter = Metrics(work(), log_every=2, clock=Clock())
    for step, (tokens, part) in enumerate([(1, 8.0), (3, 4.0)], start=1):
        step_result = replace(result(2.0, tokens=tokens), parts={"auxiliary": torch.tensor(part)})
        row = meter.update(step_result, at=at(step, step), lr=1e-3)
    assert row is not None
    assert (row["loss"], row["auxiliary"]) == (2.0, 5.0)


@pytest.mark.parametrize(
    ("gpus", "seconds", "batch", "mfu"), [(768, 0.57, 384, 0.343), (1536, 0.58, 768, 0.333), (2304, 0.64, 1152, 0.305)]
)
def test_mfu_reproduces_nemotron_4s_table(gpus: int, seconds: float, batch: int, mfu: float) -> None:
    """Table 2 of the Nemotron-4 15B report (sequence length 4096, H100 SXM)."""
    parameters, embedding, layers, width, seq = 15_628_775_424, 256_000 * 6144, 32, 6144, 4096
    flops = 6 * (parameters - embedding) + 12 * layers * width * seq
    clock = Clock()
    peak = hardware._datasheet_peak("NVIDIA H100 80GB HBM3", "bf16")
    meter = Metrics(work(flops_per_token=flops, seq_len=seq, devices=gpus, peak=peak), clock=clock)
    clock.now += seconds
    row = meter.update(result(2.0), at=at(1, batch), lr=1.0)
    assert row is not None
    # The table rounds its seconds to 2 digits: 0.005 of 0.57 moves 34.3 points by 0.3.
    assert row["mfu"] == pytest.approx(mfu, abs=0.003)


def test_loss_of_an_interval_is_weighted_by_valid_tokens() -> None:
    clock = Clock()
    meter = Metrics(work(), log_every=3, consumed_samples=10, clock=clock)
    steps = [(4.0, 1.0, 10), (3.0, 2.0, 30), (2.0, 6.0, 60)]
    rows = []
    for i, (loss, norm, tokens) in enumerate(steps):
        clock.now += 1.0
        rows.append(meter.update(result(loss, norm, tokens), at=at(i + 1, 12 + 2 * i), lr=0.1))
    assert rows[:2] == [None, None]
    assert rows[2]["loss"] == pytest.approx((40 + 90 + 120) / 100, rel=1e-15)
    assert rows[2]["grad_norm"] == 3.0
    assert rows[2]["step_seconds"] == 1.0
    assert rows[2]["tokens_per_second"] == 6 * 8 / 3  # six samples since the ten before the start


def test_a_single_step_keeps_its_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    meter = Metrics(work())
    for step in range(1, 200):
        value = torch.rand((), generator=generator) * 10
        row = meter.update(result(value.item(), tokens=7919), at=at(step, step), lr=0.1)
        assert row is not None
        assert torch.tensor(json.loads(json.dumps(row["loss"])), dtype=torch.float32).equal(value)


def test_unlogged_steps_do_not_read_the_device() -> None:
    class Unready:
        """A value that the device has not computed yet: whoever reads it would wait."""

        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"{name} was read")

    waiting = StepResult(Unready(), Unready(), Unready(), Unready())  # type: ignore[arg-type]
    meter = Metrics(work(), log_every=10)
    for step in range(1, 10):
        assert meter.update(waiting, at=at(step, step), lr=0.1) is None
    with pytest.raises(RuntimeError, match="Unready"):
        meter.update(waiting, at=at(10, 10), lr=0.1)


def test_skipped_steps_are_counted_and_left_out() -> None:
    meter = Metrics(work(), log_every=3)
    meter.update(result(4.0, 1.0), at=at(1, 1), lr=0.1)
    meter.update(result(float("nan"), float("inf"), skipped=True), at=at(2, 2), lr=0.1)
    row = meter.update(result(2.0, 3.0), at=at(3, 3), lr=0.1)
    assert row is not None
    assert (row["loss"], row["grad_norm"], row["skipped_steps"]) == (3.0, 2.0, 1)
    meter = Metrics(work())
    row = meter.update(result(float("inf"), skipped=True), at=at(1, 1), lr=0.1)
    assert row is not None
    assert (row["loss"], row["skipped_steps"]) == (float("inf"), 1)


def test_pauses_are_not_training_time_and_the_last_step_is_logged() -> None:
    clock = Clock()
    meter = Metrics(work(), log_every=10, clock=clock)
    clock.now += 1.0
    meter.update(result(1.0), at=at(1, 1), lr=0.1)
    with meter.paused():
        clock.now += 50.0
    clock.now += 2.0
    row = meter.update(result(1.0), at=at(2, 2), lr=0.1, last=True)
    assert row is not None
    assert row["step_seconds"] == 1.5


def test_log_every_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"train\.log_every=0"):
        Metrics(work(), log_every=0)


def test_a_cpu_has_no_mfu_and_nobody_is_warned() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peak = device_peak_flops("cpu", "bf16")
    row = Metrics(work(peak=peak)).update(result(1.0), at=Progress(1, 1), lr=0.1)
    assert row is not None
    assert row["mfu"] is None
    assert row["tflops_per_device"] > 0


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA A10G", "bf16", 125),
    ],
)
def test_data_sheets(name: str, dtype: str, tflops: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peak = hardware._datasheet_peak(name, dtype)
    assert peak.flops == tflops * 1e12
    assert name in peak.source


def test_fp32_on_a_gpu_depends_on_tf32() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert hardware._datasheet_peak("NVIDIA A100-SXM4-80GB", "fp32").flops == 19.5e12
        torch.set_float32_matmul_precision("high")
        assert hardware._datasheet_peak("NVIDIA A100-SXM4-80GB", "fp32").flops == 156e12
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA H20", "bf16"),
        ("Radeon", "bf16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),
        ("NVIDIA A100-SXM4-80GB", "fp8"),
    ],
)
def test_an_unknown_gpu_has_no_mfu(name: str, dtype: str) -> None:
    with pytest.warns(UserWarning, match="mfu will be null"):
        peak = hardware._datasheet_peak(name, dtype)
    assert peak.flops is None
    row = Metrics(work(peak=peak)).update(result(1.0), at=at(1, 1), lr=0.1)
    assert row is not None
    assert row["mfu"] is None
    assert row["tflops_per_device"] > 0


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="dtype=int3"):
        device_peak_flops("cpu", "int3")


@pytest.mark.slow
def test_memory_sees_what_this_process_touched() -> None:
    code = (
        "import torch; from megatron_lite.training.metrics import memory_gib as m; d = torch.device('cpu'); a = m(d); "
        "x = torch.ones(64 * 2**20); del x; print(m(d) - a)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 0.2 < float(out) < 0.3  # 256 MiB touched and freed: it is the peak that counts
    assert memory_gib(torch.device("cpu")) > 0
