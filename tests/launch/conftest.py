"""A Slurm cluster for the tests of this folder, and no silent skips in CI.

What is missing on a machine (Slurm, DeepSpeed, root) skips a test with the reason; MLITE_NO_SKIPS=1 turns such a skip into a failure.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.slurm_cluster import SlurmCluster, missing


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.skipped and os.environ.get("MLITE_NO_SKIPS") and Path(__file__).parent in item.path.parents:
        report.outcome = "failed"
        report.longrepr = f"MLITE_NO_SKIPS is set, but this was skipped: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A running cluster of node1 and node2, both on this machine."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    root = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
    cluster = SlurmCluster(root)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)
