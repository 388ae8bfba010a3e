"""The process and its surroundings: environment variables, device, process group, signals, threads.

Notable features:
- the only file that reads `os.environ`;
- one process needs no process group: `start()` opens one only when a launcher says that there are several ranks;
- if the host's own name does not resolve to a usable address, gloo gets the network interface to use, because it would bind
  to loopback;
- an image's setting to compute fp32 in TF32 is overridden;
- signal handlers only record the signal; the loop reads `Signals.number` between two steps, so that no step is interrupted.
"""

from __future__ import annotations

import ctypes
import datetime
import fcntl
import os
import platform
import signal
import socket
import struct
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

# of glibc's malloc.h: how much free memory the heap's end keeps (-1: all), and how many pieces may lie outside the heap
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class Runtime:
    """Who this process is. `rank` and `world_size` count processes, `device` is where its tensors live."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    job: str = ""  # the launcher's name for this attempt (MLITE_JOB)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def maximum(self, values: list[float]) -> list[float]:
        """The largest of each value over all ranks; one all-reduce over all hosts, without the device."""
        if self.world_size == 1:
            return values
        # on the CPU: gloo carries it, and no GPU has to finish its step
        largest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value


def launched_ranks() -> int:
    """How many ranks the launcher has started, or says that it will: WORLD_SIZE, 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:
    """The value of an environment variable. Raises ValueError if it is not a number."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ValueError(
            f"the environment variable {name}={value} is not a number; a launcher such as torchrun sets it"
        )
    return int(value)


def start(*, timeout_seconds: float = 1800.0) -> Runtime:
    """Read what the launcher (torchrun, srun) left in the environment and open the process group if there are several ranks.

    Raises ValueError when only some of RANK, WORLD_SIZE, MASTER_ADDR are set, or one is not a number.
    """
    world_size = launched_ranks()
    rank, local_rank = _number("RANK", 0), _number("LOCAL_RANK", 0)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK={local_rank}, but this machine shows {torch.cuda.device_count()} GPU(s): start one process a GPU, or "
            "hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on the CPU"
        )
    if cuda:
        torch.cuda.set_device(device)
        _keep_fp32()
    if world_size > 1:
        missing = [key for key in ("RANK", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
        if missing:
            raise ValueError(
                f"WORLD_SIZE={world_size} but {', '.join(missing)} not set: start with torchrun, or set them all"
            )
        if not dist.is_initialized():
            if world_size > _number("LOCAL_WORLD_SIZE", world_size):
                _choose_gloo_interface(os.environ["MASTER_ADDR"])
            # how long each collective takes on the GPU, which tells slow ranks (training/slow.py)
            os.environ.setdefault("TORCH_NCCL_ENABLE_TIMING", "1")
            backend = "cuda:nccl,cpu:gloo" if cuda else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_seconds))
    job = os.environ.get("MLITE_JOB", "")
    return Runtime(rank=rank, world_size=world_size, local_rank=local_rank, device=device, job=job)


def _choose_gloo_interface(master: str) -> None:
    """Set GLOO_SOCKET_IFNAME to the interface that leads to `master`, unless it is set or the host's name resolves to a real one.

    gloo binds to the address that the host's name resolves to, which on Debian's and Ubuntu's default is 127.0.1.1: no other host
    reaches that.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = "127.0.0.1"  # gloo then takes loopback too
    if not own.startswith("127."):
        return
    name = interface_to(master)
    if name is None:
        warnings.warn(
            f"the name {socket.gethostname()} resolves to {own}, which other hosts do not reach, and no interface was found that "
            f"leads to MASTER_ADDR={master}: set GLOO_SOCKET_IFNAME to this host's network interface",
            stacklevel=3,
        )
        return
    os.environ["GLOO_SOCKET_IFNAME"] = name


def interface_to(host: str) -> str | None:
    """The network interface over which IPv4 packets to `host` leave; None where that cannot be found, or is loopback."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # nothing is sent
            address = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # an interface without an address; 0x8915 is SIOCGIFADDR of Linux
                    found = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()[:15]))[20:24]
                    if socket.inet_ntoa(found) == address and not address.startswith("127."):
                        return name
    except OSError:
        return None
    return None


def _keep_fp32() -> None:
    """fp32 products in fp32. TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which NVIDIA's images set, would make them TF32: 10 bits of 23."""
    if os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "0") not in ("", "0"):
        torch.set_float32_matmul_precision("highest")


def ensure_process_group() -> None:
    """A process group of one, and the variable LOCAL_RANK, for a library that cannot do without them (DeepSpeed)."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def stop() -> None:
    """Close the process group, if `start` opened one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def set_threads(threads: int | None) -> int:
    """Set the number of CPU threads of one process (None keeps torch's choice) and return the number that applies.

    The order of a CPU reduction, and with it the last digit of a loss, depends on this number: checkpoints note it.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for what it allocates next.

    A step on a CPU allocates and frees the same tensors again and again. glibc would give the large ones back to the system, which
    then hands them out page by page, each filled with zeros: 1 to 4 % of a step. Other C libraries stay as they are.
    """
    libc = ctypes.CDLL(None)
    if platform.libc_ver()[0] == "glibc" and hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def set_deterministic(enabled: bool) -> None:
    """Ask torch, cuBLAS and NCCL for the same bits twice (matters on GPUs; the CPU kernels used here already do). Call it before
    `start`: libraries read these variables when they begin. What is set already stays."""
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")  # trees and NVLink SHARP add in an order that depends on the run
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        torch.use_deterministic_algorithms(True)
        # a check of torch's own that costs time
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class Signals:
    """Notes SIGTERM, SIGINT and SIGUSR1 while it is open, and gives the old handlers back at the end.

    A second SIGINT raises KeyboardInterrupt, to stop at once. SIGTERM may arrive several times: a scheduler sends it to
    every process, and the launcher forwards it. The SIGINT of a Ctrl-C does too, so a second one counts only after a second.
    """

    watched = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.number: int | None = None  # of the first signal that came
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        for number in self.watched:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() > self._since + 1.0:
            raise KeyboardInterrupt
