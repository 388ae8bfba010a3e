"""What a process sets at its start: the interface of gloo, determinism, fp32 as fp32, freed memory that is kept."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import warnings

import pytest
import torch

from megatron_lite import runtime
from megatron_lite.precision.dtypes import PrecisionConfig


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """An environment of this test's own, which whatever is set here leaves alone."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("GLOO_SOCKET_IFNAME", None)


@pytest.mark.parametrize(
    ("resolves_to", "leads_to", "chosen"),
    [
        ("127.0.1.1", "eth7", "eth7"),  # Ubuntu's and DGX OS's default
        ("10.0.0.5", "eth7", None),
        (OSError(), "eth7", "eth7"),
    ],
)
def test_gloo_is_given_an_interface_where_the_host_name_means_loopback(monkeypatch, resolves_to, leads_to, chosen):
    def resolve(name: str) -> str:
        if isinstance(resolves_to, OSError):
            raise resolves_to
        return resolves_to

    monkeypatch.setattr(socket, "gethostbyname", resolve)
    monkeypatch.setattr(runtime, "interface_to", lambda host: leads_to)
    runtime._choose_gloo_interface("master")
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen


def test_a_choice_of_gloos_interface_stays_and_a_missing_one_is_said(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.setattr(runtime, "interface_to", lambda host: None)
    with pytest.warns(UserWarning, match=r"127\.0\.1\.1.*MASTER_ADDR=master.*GLOO_SOCKET_IFNAME"):
        runtime._choose_gloo_interface("master")
    os.environ["GLOO_SOCKET_IFNAME"] = "ib0"
    runtime._choose_gloo_interface("master")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_the_interface_to_a_host():
    assert runtime.interface_to("127.0.0.1") is None
    assert runtime.interface_to("no.such.host.invalid") is None
    names = [name for _, name in socket.if_nameindex()]
    assert runtime.interface_to("192.0.2.1") in [None, *names]  # None on a machine without a network


@pytest.mark.slow
def test_deterministic_speaks_to_every_library_and_keeps_what_is_set():
    code = (
        "import os; from megatron_lite.runtime import set_deterministic as s; s(True); import torch; "
        "print(*(os.environ[k] for k in ('CUBLAS_WORKSPACE_CONFIG', 'NCCL_ALGO', 'NCCL_NVLS_ENABLE')), "
        "torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NCCL_ALGO": "Tree"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [":4096:8", "Tree", "0", "True", "False"]


@pytest.mark.slow
def test_an_image_does_not_decide_what_fp32_is():
    code = (
        "import torch; from megatron_lite import runtime; before = torch.get_float32_matmul_precision(); "
        "runtime._keep_fp32(); print(before, torch.get_float32_matmul_precision())"
    )
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["high", "highest"]


def test_fp32_on_a_gpu_is_warned_of():
    with pytest.warns(UserWarning, match="precision=fp32.*precision=bf16"):
        PrecisionConfig("fp32").warn_if_slow(torch.device("cuda", 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PrecisionConfig("bf16").warn_if_slow(torch.device("cuda", 0))
        PrecisionConfig("fp32").warn_if_slow(torch.device("cpu"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.slow
def test_freed_memory_is_used_again():
    """A tensor of 64 MiB is 16,384 pages, which the system would give again and again. Small pieces of what is freed may be taken by
    others; after some rounds it finds its place."""
    code = """
import resource, torch
from megatron_lite import runtime
runtime.keep_freed_memory()
faults = []
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""  # a process of its own: what this one allocated before decides where the next piece comes from
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100
