"""What a GPU knows of errors in its memory, asked from nvidia-smi.

Uncorrectable ECC errors end the process that meets them; from Ampere on the driver then remaps the row, which takes effect at the
next reset of the GPU, and fails when no spare row is left (NVIDIA GPU Memory Error Management).
"""

from __future__ import annotations

import subprocess

import torch

_ERRORS = ("ecc.errors.uncorrected.volatile.total",)
_ROWS = ("remapped_rows.pending", "remapped_rows.failure")
_SECONDS = 30.0  # nvidia-smi hangs where the driver does


def memory_faults(device: torch.device) -> tuple[str, ...]:
    """What is wrong with the memory of this GPU; nothing on a CPU, and where nvidia-smi cannot be asked."""
    if device.type != "cuda":
        return ()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return faults(_ask("gpu", _ERRORS, uuid) + _ask("remapped-rows", _ROWS, uuid))


def faults(values: list[str]) -> tuple[str, ...]:
    """The faults in what nvidia-smi answers for `_ERRORS` and `_ROWS`: numbers, Yes or No, or N/A in brackets."""
    errors, pending, failed = (*values, "", "", "")[:3]
    found = []
    if errors.isdigit() and int(errors):
        found.append(f"{errors} uncorrectable ECC error(s) since its driver was loaded")
    if pending in ("1", "Yes"):
        found.append("a memory row that waits to be remapped: reset it")
    if failed in ("1", "Yes"):
        found.append("a memory row that could not be remapped: replace it")
    return tuple(found)


def _ask(kind: str, fields: tuple[str, ...], uuid: str) -> list[str]:
    """The values of the fields of one GPU, empty texts where there is no answer."""
    command = ["nvidia-smi", f"--query-{kind}={','.join(fields)}", "--format=csv,noheader,nounits", f"--id={uuid}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return [""] * len(fields)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return values if len(values) == len(fields) else [""] * len(fields)
