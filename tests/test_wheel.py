"""A built wheel, installed elsewhere, has all that it needs: configs, data tools, commands. Slow: it builds the sample corpus."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command in `cwd`; its output, or a failure that shows it. Nothing of this checkout is on the path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    flags = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q")
    run(sys.executable, "-m", "pip", "wheel", *flags, "-w", folder, ROOT, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A fresh environment's bin/ with the wheel in it; the dependencies are those of the environment of the tests."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    here = sysconfig.get_paths()["purelib"]
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip())
    run(
        python,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
        "-q",
        wheel,
        cwd=folder,
    )
    (site / "dependencies.pth").write_text(
        here + "\n"
    )  # of which the .pth files, and so the editable checkout, are not read
    return folder / "bin"


def test_configs_and_data_tools_travel_in_it(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in (("configs", "megatron_lite/configs"), ("data_tools", "data_tools")):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".yaml", ".py"):
                assert f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_it_trains_from_an_empty_directory(installed, tmp_path):
    origin = run(installed / "python", "-c", "import megatron_lite; print(megatron_lite.__file__)", cwd=tmp_path)
    assert str(ROOT) not in origin
    keys = ("train.max_steps=3", "schedule.warmup_steps=1", "train.global_batch_size=2", "train.micro_batch_size=2")
    run(installed / "mlite", "train", "experiment=smoke", *keys, "checkpoint.every=2", "train.threads=1", cwd=tmp_path)
    assert (tmp_path / "runs" / "smoke" / "status.json").read_text().startswith('{"state": "finished", "step": 3')
    text = run(installed / "mlite", "generate", "checkpoint=runs/smoke", "prompt=def", "max_new_tokens=2", cwd=tmp_path)
    assert text.startswith("def")
    recipes = "from megatron_lite.config.compose import config_dir; print(*(config_dir() / 'data_recipe').iterdir())"
    assert "three_groups.yaml" in run(installed / "python", "-c", recipes, cwd=tmp_path)
