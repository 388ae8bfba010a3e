"""What a device can do: peak FLOP/s from the data sheets."""

from __future__ import annotations

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
