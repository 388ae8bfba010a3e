"""From step results and a clock to the rows of metrics.jsonl: loss, speed, model FLOPs utilisation, memory.

    MFU = flops_per_token * tokens / (seconds * devices * peak)

with `flops_per_token` the model's training FLOPs (6 per parameter but the input embedding's, plus 12 * layers *
heads * head_dim * sequence for full, not causally halved, attention; no recomputation counted: Nemotron-4 report,
table 2, and PaLM, appendix B) and `peak` the dense FLOP/s of one device (`device_peak_flops`).

Notable:
  - no host sync between logged steps: results stay on the device, and one transfer fetches an interval's worth;
  - with `log_every` > 1 a row speaks for its interval: `loss` is the mean over the interval's valid tokens,
    `grad_norm` the plain mean, `step_seconds` the mean, the speeds are totals over totals. Skipped steps
    (non-finite loss or gradient) are left out of loss and norm and counted in `skipped_steps`; if every step
    was skipped, the row shows the last one's values;
  - validation and saving happen inside `with metrics.paused():` and are not counted as training time.
"""

from __future__ import annotations

import re
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch


class Result(Protocol):
    """What an engine's step returns; scalars on the device, or plain numbers."""

    @property
    def loss(self) -> Any: ...
    @property
    def grad_norm(self) -> Any: ...
    @property
    def valid_tokens(self) -> Any: ...
    @property
    def skipped(self) -> Any: ...


# ---------------------------------------------------------------------------------------------------- peak


@dataclass(frozen=True)
class Peak:
    """The dense FLOP/s of one device; None when nobody knows. `measured`: by a matmul, not from a data sheet."""

    flops: float | None
    source: str
    measured: bool = False

    def __str__(self) -> str:
        if self.flops is None:
            return f"unknown ({self.source})"
        return f"{self.flops / 1e12:.4g} TFLOP/s per device, {self.source}"


# Dense TFLOP/s (bf16 with fp32 accumulation, fp8, fp32 outside tensor cores) from NVIDIA's data sheets, which
# print tensor-core rates "with sparsity", twice the dense ones, from Ada and Hopper on. First match wins. None: the device has none.
# H100/H200: "NVIDIA H100/H200 Tensor Core GPU" data sheets; A100: "A100 80GB" data sheet; L4, L40S, A10: their
# data sheets; B200: DGX B200 data sheet / 8; RTX 4090, 3090: Ada and Ampere GA102 white papers, appendix A.
_PEAKS: tuple[tuple[str, float, float | None, float], ...] = (
    (r"\bH200 NVL\b", 835.5, 1671, 60),
    (r"\bH200\b", 989, 1979, 67),
    (r"\bGH200\b", 989, 1979, 67),
    (r"\bH100 PCIe\b", 756, 1513, 51),
    (r"\bH100 NVL\b", 835.5, 1671, 60),
    (r"\bH100\b", 989, 1979, 67),
    (r"\bB200\b", 2250, 4500, 75),
    (r"\bA100\b", 312, None, 19.5),
    (r"\bL40S\b", 362, 733, 91.6),
    (r"\bL4\b", 121, 242, 30.3),
    (r"\bA10G?\b", 125, None, 31.2),
    (r"\bRTX 4090\b(?! (D|Laptop))", 165.2, 330.3, 82.6),
    (r"\bRTX 3090\b(?! Ti)", 71, None, 35.6),
)


def device_peak_flops(device: torch.device | str, dtype: str = "bf16") -> Peak:
    """The peak for `dtype` (bf16, fp16, fp8 or fp32) on `device`.

    GPU: from the data sheets; fp32 means TF32 (half of bf16) where `torch.get_float32_matmul_precision()` allows
    it. An unknown GPU, or a part of one (MIG), has no peak: one warning, and MFU stays null. CPU: the best fp32
    matmul within 0.3 s, whatever `dtype`, since that is the fastest thing most CPUs do; on one process's threads.
    Raises ValueError for an unknown dtype.
    """
    if dtype not in ("bf16", "fp16", "fp8", "fp32"):
        raise ValueError(f"dtype={dtype} has no peak in the table; use bf16, fp16, fp8 or fp32")
    device = torch.device(device)
    if device.type == "cpu":
        return _measured_peak()
    if device.type != "cuda":
        return _unknown_peak(device.type)
    return _datasheet_peak(torch.cuda.get_device_name(device), dtype)


def _datasheet_peak(name: str, dtype: str) -> Peak:
    if "MIG" in name.split():
        return _unknown_peak(name)
    for pattern, bf16, fp8, fp32 in _PEAKS:
        if not re.search(pattern, name):
            continue
        if dtype == "fp32" and torch.get_float32_matmul_precision() != "highest":
            return Peak(bf16 / 2 * 1e12, f"dense tf32, data sheet of {name}")
        tflops = {"bf16": bf16, "fp16": bf16, "fp8": fp8, "fp32": fp32}[dtype]
        return Peak(tflops * 1e12, f"dense {dtype}, data sheet of {name}") if tflops else _unknown_peak(name)
    return _unknown_peak(name)


def _unknown_peak(name: str) -> Peak:
    warnings.warn(f"no peak FLOP/s known for {name}: mfu will be null in the metrics", stacklevel=3)
    return Peak(None, f"{name} is not in the table")


def _measured_peak(*, sizes: tuple[int, ...] = (512, 1024), seconds: float = 0.25) -> Peak:
    """The best rate of many: small matmuls slip between other processes' turns, large ones keep many cores busy."""
    matrices = [torch.ones(size, size) for size in sizes]
    torch.mm(matrices[0], matrices[0])  # starts the threads
    best, deadline = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < deadline:
        for x in matrices:
            began = time.perf_counter()
            torch.mm(x, x)
            best = max(best, 2 * len(x) ** 3 / (time.perf_counter() - began))
    threads = torch.get_num_threads()
    return Peak(best, f"measured: best fp32 matmul on {threads} CPU thread{'s'[: threads > 1]}", measured=True)


# ------------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one token costs and what carries it."""

    flops_per_token: float
    seq_len: int  # tokens a sample
    devices: int  # in the whole job
    peak: Peak
    device: torch.device


class Metrics:
    """Collects step results; every `log_every`-th step gives a row.

    log_every counts global steps (rows fall on its multiples), so the rows of a resumed run fall on the same
    steps; its first interval is shorter if it was stopped within one.
    """

    def __init__(
        self,
        work: Work,
        *,
        log_every: int = 1,
        consumed_samples: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if log_every < 1:
            raise ValueError(f"train.log_every={log_every} must be at least 1")
        self.work, self.log_every, self.clock = work, log_every, clock
        self._consumed = consumed_samples
        self._results: list[Result] = []
        self._samples = 0
        self._since = clock()

    def start(self) -> None:
        """Training begins now: what came before (loading, tracking services) is no training time."""
        self._since = self.clock()

    def update(
        self, result: Result, *, step: int, consumed_samples: int, lr: float, last: bool = False
    ) -> dict[str, Any] | None:
        """Take step `step` (1 is the first), after which `consumed_samples` were used in the whole run.

        Returns the row at multiples of `log_every` and at the `last` step, else None without touching the device.
        """
        self._results.append(result)
        self._samples += consumed_samples - self._consumed
        self._consumed = consumed_samples
        if step % self.log_every != 0 and not last:
            return None
        row: dict[str, Any] = {
            "step": step,
            "consumed_samples": consumed_samples,
            "consumed_tokens": consumed_samples * self.work.seq_len,
            **_averages(_to_host(self._results)),  # waits for the device, hence before the clock is read
            "lr": float(lr),
        }
        seconds = self.clock() - self._since
        row.update(self._speed(seconds), memory_gib=memory_gib(self.work.device))
        self._results, self._samples, self._since = [], 0, self.clock()
        return row

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not training time (validation, saving)."""
        if self.work.device.type == "cuda":
            torch.cuda.synchronize(self.work.device)  # queued training work belongs to training
        began = self.clock()
        try:
            yield
        finally:
            self._since += self.clock() - began

    def _speed(self, seconds: float) -> dict[str, Any]:
        work, steps = self.work, len(self._results)
        tokens = self._samples * work.seq_len
        seconds = max(seconds, 1e-9)  # a clock too coarse to see a tiny step
        flops = work.flops_per_token * tokens / (seconds * work.devices)
        return {
            "step_seconds": seconds / steps,
            "tokens_per_second": tokens / seconds,
            "tflops_per_device": flops / 1e12,
            "mfu": flops / work.peak.flops if work.peak.flops else None,
            "mfu_peak_measured": work.peak.measured,
        }


def _to_host(results: list[Result]) -> list[list[float]]:
    """(loss, grad_norm, valid_tokens, skipped) of each step as floats, in one transfer."""
    columns = [[torch.as_tensor(v) for v in (r.loss, r.grad_norm, r.valid_tokens, r.skipped)] for r in results]
    devices = {v.device for row in columns for v in row if v.device.type != "cpu"}
    device = devices.pop() if devices else torch.device("cpu")
    # Wide enough to be exact: fp32 losses and counts below 2^53. MPS has no float64.
    wide = torch.float32 if device.type == "mps" else torch.float64
    flat = torch.stack([v.detach().reshape(()).to(device, wide) for row in columns for v in row])
    return flat.view(len(results), 4).tolist()


def _averages(steps: list[list[float]]) -> dict[str, Any]:
    good = [step for step in steps if not step[3]] or steps[-1:]
    tokens = sum(step[2] for step in good)
    if len(good) == 1:  # the very bits of the step, which x * n / n would not keep
        loss, grad_norm = good[0][0], good[0][1]
    else:
        loss = sum(step[0] * step[2] for step in good) / tokens if tokens else float("nan")
        grad_norm = sum(step[1] for step in good) / len(good)
    averages: dict[str, Any] = {"loss": loss, "grad_norm": grad_norm}
    if skipped := sum(1 for step in steps if step[3]):
        averages["skipped_steps"] = skipped
    return averages


def memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: the CUDA allocator's, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count the process that started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on a Mac, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
