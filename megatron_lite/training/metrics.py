"""From step results and a clock to the rows of metrics.jsonl: loss, speed, model FLOPs utilization, memory.

    MFU = flops_per_token * tokens / (seconds * devices * peak)

with `flops_per_token` the model's training FLOPs (`models/flops.py` counts them; no recomputation is counted: Nemotron-4
report, table 2, and PaLM, appendix B) and `peak` the dense FLOP/s of one device (`device_peak_flops`).

Notable:
  - no host sync between logged steps: results stay on the device, and one transfer fetches an interval's worth;
  - with `log_every` > 1 a row summarizes its interval: `loss` is the mean over the interval's valid tokens,
    `grad_norm` the plain mean, `step_seconds` the mean, the speeds are totals over totals. Skipped steps
    (non-finite loss or gradient) are left out of loss and norm and counted in `skipped_steps`; if every step
    was skipped, the row shows the last one's values;
  - validation and saving happen inside `with metrics.paused():` and are not counted as training time.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lite.engine.base import StepResult
from megatron_lite.hardware import Peak
from megatron_lite.optim.schedule import Progress

# read by the watchdog: here the host fetches numbers from a GPU, whose collectives may not end
WAITS_FOR_OTHER_RANKS = True


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
        self._results: list[StepResult] = []
        self._samples, self._rows = 0, 0
        self._since = clock()

    def start(self) -> None:
        """Training begins now: what came before (loading, tracking services) is not training time."""
        self._since = self.clock()

    def restart(self, consumed_samples: int) -> None:
        """The run went back: what was collected is dropped, and the next step begins at `consumed_samples`."""
        self._consumed, self._results, self._samples = consumed_samples, [], 0

    def update(self, result: StepResult, *, at: Progress, lr: float, last: bool = False) -> dict[str, Any] | None:
        """Take the result of step `at.step` (1 is the first), after which the whole run stands at `at`.

        Returns the row at multiples of `log_every` and at the `last` step, else None without touching the device.
        """
        self._results.append(result)
        self._samples += at.consumed_samples - self._consumed
        self._consumed = at.consumed_samples
        if at.step % self.log_every != 0 and not last:
            return None
        averages = _averages(_to_host(self._results))  # waits for the device, hence before the clock is read
        row: dict[str, Any] = {
            "step": at.step,
            "consumed_samples": at.consumed_samples,
            "consumed_tokens": at.consumed_tokens,
            **averages,
            "lr": float(lr),
        }
        seconds = self.clock() - self._since
        row.update(self._speed(seconds), memory_gib=memory_gib(self.work.device))
        if self.work.device.type == "cuda":
            row |= self._allocator(torch.cuda.memory_stats(self.work.device))
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

    def _allocator(self, stats: dict[str, int]) -> dict[str, int]:
        """What the allocator had to try again, once it has: such a run is short of memory and slow. After the first row, peaks are
        those of training, not of building the model."""
        if not self._rows:
            torch.cuda.reset_peak_memory_stats(self.work.device)
        self._rows += 1
        retries = stats.get("num_alloc_retries", 0)
        return {"allocation_retries": retries} if retries else {}

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
        }


def _to_host(results: list[StepResult]) -> list[dict[str, float]]:
    """Every number of each step as floats, in one transfer."""
    steps = [
        {"loss": r.loss, "grad_norm": r.grad_norm, "tokens": r.valid_tokens, "skipped": r.skipped, **r.parts}
        for r in results
    ]
    values = [torch.as_tensor(value) for step in steps for value in step.values()]
    devices = {value.device for value in values if value.device.type != "cpu"}
    device = devices.pop() if devices else torch.device("cpu")
    # Wide enough to be exact: fp32 losses and counts below 2^53. MPS has no float64.
    wide = torch.float32 if device.type == "mps" else torch.float64
    numbers = iter(torch.stack([value.detach().reshape(()).to(device, wide) for value in values]).tolist())
    return [{key: next(numbers) for key in step} for step in steps]


def _averages(steps: list[dict[str, float]]) -> dict[str, Any]:
    """Loss and parts over the tokens of the steps that were not skipped, grad_norm over these steps."""
    good = [step for step in steps if not step["skipped"]] or steps[-1:]
    tokens = sum(step["tokens"] for step in good)
    averages: dict[str, Any] = {}
    for key in (key for key in good[0] if key not in ("tokens", "skipped")):
        if len(good) == 1:  # the very bits of the step, which x * n / n would not keep
            averages[key] = good[0][key]
        elif key == "grad_norm":
            averages[key] = sum(step[key] for step in good) / len(good)
        else:
            averages[key] = sum(step[key] * step["tokens"] for step in good) / tokens if tokens else float("nan")
    if skipped := sum(1 for step in steps if step["skipped"]):
        averages["skipped_steps"] = skipped
    return averages


def memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: the CUDA allocator's, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count the process that started this one
        for line in status.read_text().split("\n"):
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on a Mac, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
