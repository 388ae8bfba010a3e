"""node.sh: what a node is asked for, and what is put right there, before torchrun starts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_lite.commands.launch import scripts_dir

NODE = scripts_dir() / "node.sh"


@pytest.fixture
def node(tmp_path: Path):
    """Run node.sh under some limits; its interpreter shows the arguments, the limit of open files and NCCL's devices."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\nulimit -Sn\necho "devices ${NCCL_IB_HCA-dropped}"\n')
    python.chmod(0o755)
    (tmp_path / "infiniband").mkdir()
    for name in ("mlx5_0", "mlx5_3"):
        (tmp_path / "infiniband" / name).touch()

    def run(limits: str, *words: str, ranks: int = 16, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "INFINIBAND_DEVICES": str(tmp_path / "infiniband"), **settings}
        code = f'{limits}; exec bash "$@"'
        command = ["bash", "-c", code, "bash", str(NODE), str(ranks), str(python), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    return run


def test_the_soft_limit_of_open_files_is_raised(node):
    """gloo alone takes two descriptors a rank in every process; Slurm hands on the login node's 1,024."""
    done = node("ulimit -Sn 32; ulimit -Hn 4096", "--nnodes=2", ranks=768)
    assert done.stdout.splitlines()[:2] == ["-m torch.distributed.run --nnodes=2", "4096"]


def test_a_hard_limit_that_is_too_low_is_refused_with_the_number(node):
    done = node("ulimit -n 1024", ranks=768)
    assert done.returncode == 2
    assert "1024" in done.stderr
    assert "2036" in done.stderr
    assert done.stdout == ""


def test_little_locked_memory_is_told_where_there_is_infiniband(node, tmp_path):
    assert ("64 KiB of locked memory" in node("ulimit -l 64").stderr) is stays_limited()
    assert "locked memory" not in node("ulimit -l 64", INFINIBAND_DEVICES=str(tmp_path / "none")).stderr


def stays_limited() -> bool:
    """Whether `ulimit -l unlimited` is refused after a lower limit was set; root may raise it."""
    code = "ulimit -l 64; ulimit -l unlimited 2>/dev/null; ulimit -l"
    shown = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False).stdout
    return shown.strip() == "64"


@pytest.mark.parametrize(
    ("devices", "left"),
    [
        ("=mlx5_0,mlx5_3", "=mlx5_0,mlx5_3"),
        ("=mlx5_0:1,mlx5_3:1", "=mlx5_0:1,mlx5_3:1"),
        ("=mlx5_0,mlx5_9", "dropped"),
        ("mlx5", "mlx5"),  # a prefix: nothing that could be missing
    ],
)
def test_devices_that_a_node_lacks(node, devices, left):
    done = node(":", NCCL_IB_HCA=devices)
    assert f"devices {left}" in done.stdout
    assert ("mlx5_9" in done.stderr) is (left == "dropped")


def test_numa_binding(node):
    assert "--numa-binding" not in node(":", "--nnodes=1", NUMA_BINDING="").stdout
    assert "run --numa-binding=socket --nnodes=1" in node(":", "--nnodes=1", NUMA_BINDING="socket").stdout
