"""Fixtures that many test files share, the same property tests everywhere, and no silent skips in CI.

What is missing on a machine (Slurm, DeepSpeed, root) skips a test with the reason; MLITE_NO_SKIPS=1 turns such a skip into a failure.
Hypothesis draws the same examples at every run; HYPOTHESIS_PROFILE=explore draws new ones.
"""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import runs

ANY_SPEED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, **ANY_SPEED)
settings.register_profile("explore", **ANY_SPEED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.skipped and os.environ.get("MLITE_NO_SKIPS"):
        report.outcome = "failed"
        report.longrepr = f"MLITE_NO_SKIPS is set, but this was skipped: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What imports make stays; searching it for garbage again and again takes a fifth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of three sources and the config group that names them (see `runs.make_data`)."""
    return runs.make_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def straight(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 20 steps without interruption, not to be changed: copy it first (`copy_of`)."""
    directory = tmp_path_factory.mktemp("runs") / "straight"
    assert runs.run(tiny_data, directory, drawn=True) == 0
    return directory


@pytest.fixture
def copy_of(tmp_path: Path):
    """A private copy of a run directory."""

    def copy(directory: Path) -> Path:
        return Path(shutil.copytree(directory, tmp_path / directory.name))

    return copy
