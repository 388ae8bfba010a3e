"""A Slurm cluster for the tests of this folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.slurm_cluster import SlurmCluster, missing
from tests.launch.slurm_job import Job


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


@pytest.fixture(scope="module")
def uninterrupted(slurm: SlurmCluster, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-node run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("slurm") / "whole"
    job = Job(slurm, tiny_data, directory)
    assert job.wait() == "COMPLETED", job.story()
    return directory
