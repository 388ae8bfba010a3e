"""What a device can do, from the data sheets: peak FLOP/s, memory, and the links to other devices.

`device_peak_flops` is asked about the device that is there, `gpu_named` about one that may not be.
"""

from __future__ import annotations

import difflib
import re
import warnings
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """The dense FLOP/s of one device according to its data sheet; None if unknown."""

    flops: float | None
    source: str

    def __str__(self) -> str:
        if self.flops is None:
            return f"unknown ({self.source})"
        return f"{self.flops / 1e12:.4g} TFLOP/s per device, {self.source}"


@dataclass(frozen=True)
class Gpu:
    """One type of GPU as its data sheet describes it, and the node that it is usually part of.

    bf16, fp8, fp32: dense FLOP/s with fp32 accumulation, fp32 outside of tensor cores; None: the GPU has none. memory: bytes.
    bandwidth: bytes/s of that memory. link: bytes/s that it sends to the other GPUs of its node, in one direction. network: bytes/s
    that it sends to other nodes, in one direction. node: GPUs in a node. pattern: matches torch's name of the device.
    """

    name: str
    pattern: str
    bf16: float
    fp8: float | None
    fp32: float
    memory: float
    bandwidth: float
    link: float
    network: float
    node: int

    def flops(self, dtype: str) -> float:
        """Dense FLOP/s in bf16, fp8 or fp32. Raises ValueError if it has none."""
        peak = {"bf16": self.bf16, "fp8": self.fp8, "fp32": self.fp32}[dtype]
        if peak is None:
            raise ValueError(f"gpu={self.name} has no {dtype} tensor cores; set precision=bf16, or choose another gpu")
        return peak


def _gpu(name: str, pattern: str, tflops: tuple[float, float | None, float], *gigabytes: float, node: int = 8) -> Gpu:
    """A row of the table. tflops: bf16, fp8, fp32. gigabytes (10^9): memory, its bandwidth, link, network (a second)."""
    bf16, fp8, fp32 = tflops
    memory, bandwidth, link, network = (value * 1e9 for value in gigabytes)
    fp8_flops = None if fp8 is None else fp8 * 1e12
    return Gpu(name, pattern, bf16 * 1e12, fp8_flops, fp32 * 1e12, memory, bandwidth, link, network, node)


# NVIDIA's data sheets print tensor-core rates "with sparsity", twice the dense ones, from Ada and Hopper on, and links in both
# directions together: here dense rates, and one direction. First match of a pattern wins.
# H100/H200: "NVIDIA H100/H200 Tensor Core GPU" data sheets; A100: "A100 80GB" data sheet; L4, L40S, A10: their
# data sheets; B200: DGX B200 data sheet / 8; RTX 4090, 3090: Ada and Ampere GA102 white papers, appendix A.
# Network: of the DGX systems one 400 Gb/s card a GPU (DGX H100, H200, B200), 200 Gb/s (DGX A100); of the others half a 200 Gb/s card,
# which is our guess.
GPUS: tuple[Gpu, ...] = (
    _gpu("h200-nvl", r"\bH200 NVL\b", (835.5, 1671, 60), 141, 4800, 450, 25),
    _gpu("h200", r"\bH200\b", (989, 1979, 67), 141, 4800, 450, 50),
    _gpu("gh200", r"\bGH200\b", (989, 1979, 67), 96, 4000, 450, 50, node=4),
    _gpu("h100-pcie", r"\bH100 PCIe\b", (756, 1513, 51), 80, 2000, 64, 25),
    _gpu("h100-nvl", r"\bH100 NVL\b", (835.5, 1671, 60), 94, 3900, 64, 25),
    _gpu("h100", r"\bH100\b", (989, 1979, 67), 80, 3350, 450, 50),
    _gpu("b200", r"\bB200\b", (2250, 4500, 75), 180, 8000, 900, 50),
    _gpu("a100", r"\bA100\b", (312, None, 19.5), 80, 2039, 300, 25),
    _gpu("l40s", r"\bL40S\b", (362, 733, 91.6), 48, 864, 32, 12.5),
    _gpu("l4", r"\bL4\b", (121, 242, 30.3), 24, 300, 32, 12.5),
    _gpu("a10", r"\bA10G?\b", (125, None, 31.2), 24, 600, 32, 12.5),
    _gpu("rtx4090", r"\bRTX 4090\b(?! (D|Laptop))", (165.2, 330.3, 82.6), 24, 1008, 32, 12.5),
    _gpu("rtx3090", r"\bRTX 3090\b(?! Ti)", (71, None, 35.6), 24, 936, 32, 12.5),
)


def gpu_named(name: str) -> Gpu:
    """The row of the table for `gpu=<name>`. Raises ValueError for a name that is not in it."""
    gpus = {gpu.name: gpu for gpu in GPUS}
    if name.lower() not in gpus:
        close = difflib.get_close_matches(name.lower(), gpus, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"gpu={name} is not in the table; {meant}choose one of {', '.join(gpus)}")
    return gpus[name.lower()]


def device_peak_flops(device: torch.device | str, dtype: str = "bf16") -> Peak:
    """The peak for `dtype` (bf16, fp16, fp8 or fp32) on `device`.

    GPU: from the data sheets; fp32 means TF32 (half of bf16) where `torch.get_float32_matmul_precision()` allows
    it. An unknown GPU, or a part of one (MIG), has no peak: there is one warning, and MFU is null. A CPU has no peak either,
    because other processes share it: two timings of a matmul within an hour differed by a factor of two.
    Raises ValueError for an unknown dtype.
    """
    if dtype not in ("bf16", "fp16", "fp8", "fp32"):
        raise ValueError(f"dtype={dtype} has no peak in the table; use bf16, fp16, fp8 or fp32")
    device = torch.device(device)
    if device.type == "cpu":
        return Peak(None, "a CPU has no data sheet peak")
    if device.type != "cuda":
        return _unknown_peak(device.type)
    return _datasheet_peak(torch.cuda.get_device_name(device), dtype)


def _datasheet_peak(name: str, dtype: str) -> Peak:
    if "MIG" in name.split():
        return _unknown_peak(name)
    gpu = next((gpu for gpu in GPUS if re.search(gpu.pattern, name)), None)
    if gpu is None:
        return _unknown_peak(name)
    if dtype == "fp32" and torch.get_float32_matmul_precision() != "highest":
        return Peak(gpu.bf16 / 2, f"dense tf32, data sheet of {name}")
    flops = {"bf16": gpu.bf16, "fp16": gpu.bf16, "fp8": gpu.fp8, "fp32": gpu.fp32}[dtype]
    return Peak(flops, f"dense {dtype}, data sheet of {name}") if flops else _unknown_peak(name)


def _unknown_peak(name: str) -> Peak:
    warnings.warn(f"no peak FLOP/s known for {name}: mfu will be null in the metrics", stacklevel=3)
    return Peak(None, f"{name} is not in the table")
