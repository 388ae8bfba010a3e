"""The Dockerfile's installation, replayed on a base that pretends to be NVIDIA's image, whose versions it must not touch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
slow = pytest.mark.slow


def pretend(site: Path, name: str, version: str) -> Path:
    """An installed distribution that is nothing but its name and version: its folder."""
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("pip\n")
    (folder / "RECORD").write_text(f"{folder.name}/METADATA,,\n{folder.name}/INSTALLER,,\n{folder.name}/RECORD,,\n")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment with nothing in it but what these tests put there, one after the other."""
    folder = tmp_path_factory.mktemp("environment") / "base"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    return folder / "bin" / "python"


def site_of(base: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([base, "-c", code], check=True, capture_output=True, text=True).stdout.strip())


def install(base: Path, copy: Path) -> subprocess.CompletedProcess[str]:
    """What the Dockerfile copies, and its RUN line; but with pip's cache, which has most of it from this environment's own installation."""
    lines = (PROJECT / "Dockerfile").read_text().splitlines()
    sources = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    copy.mkdir()
    subprocess.run(["cp", "-r", *(str(PROJECT / source) for source in sources), str(copy)], check=True)
    run = next(line for line in lines if "container_install.sh" in line).removeprefix("RUN ")
    script = copy / "launch" / "container_install.sh"
    script.write_text(script.read_text().replace(" --no-cache-dir", ""))
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", run], cwd=copy, env={**os.environ, "PYTHON": str(base), "PIP_NO_COMPILE": "1"},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


@slow
def test_a_base_without_torch_fails(base, tmp_path):
    done = install(base, tmp_path / "copy")
    assert done.returncode != 0
    assert "the base has no torch" in done.stderr


@slow
def test_a_base_that_is_too_old_fails(base, tmp_path):
    old = pretend(site_of(base), "torch", "2.5.0")
    done = install(base, tmp_path / "copy")
    shutil.rmtree(old)
    assert done.returncode != 0
    assert "torch" in done.stderr


@slow
def test_nothing_of_the_base_changes(base, tmp_path):
    pretend(site_of(base), "torch", "2.12.0a0+5aff3928d8.nv26.5")
    pretend(site_of(base), "transformer_engine", "2.14.0+f031cf87")
    done = install(base, tmp_path / "copy")
    if "No matching distribution" in done.stdout + done.stderr or "Temporary failure in name" in done.stderr:
        pytest.skip(f"no package index: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    listed = subprocess.run([base, "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout.split()
    assert "2.12.0a0+5aff3928d8.nv26.5" in listed
    assert "2.14.0+f031cf87" in listed
    assert (base.parent / "mlite").exists()
    launchers = site_of(base) / "megatron_lite" / "launchers"
    assert {"local.sh", "slurm.sh", "slurm.sbatch", "common.sh", "kubernetes.yaml"} <= {
        f.name for f in launchers.iterdir()
    }
    words = [str(base.parent / "mlite"), "launch", "slurm", "--dry-run", "NODES=2", "experiment=smoke"]
    shown = subprocess.run(words, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert f"{launchers}/slurm.sbatch experiment=smoke" in shown
    assert "TORCH_FR_BUFFER_SIZE=2000" in shown


def test_the_first_of_two_versions_is_the_one_that_is_imported(tmp_path):
    """Debian's packages lie behind those of /usr/local; a folder without METADATA is left by a removal."""
    for folder, version in (("local", "6.0.2"), ("system", "6.0.3")):
        pretend(tmp_path / folder, "pyyaml", version)
        pretend(tmp_path / folder, "torch", "2.12.0")
    (tmp_path / "local" / "gone-1.0.dist-info").mkdir()
    (tmp_path / "pip.py").write_text(
        "import os, pathlib\nprint(pathlib.Path(os.environ['PIP_CONSTRAINT']).read_text())\n"
    )
    path = ":".join(str(tmp_path / name) for name in ("", "local", "system"))
    done = subprocess.run(
        ["bash", str(PROJECT / "launch" / "container_install.sh")],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": path, "PIP_CONSTRAINT": ""},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pyyaml==6.0.2" in done.stdout.split()
    assert "pyyaml==6.0.3" not in done.stdout.split()
