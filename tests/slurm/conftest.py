"""One cluster for all tests of this folder; each test finds it idle and whole."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm.cluster import SCRIPT, Cluster


@pytest.fixture(scope="session")
def _two_nodes() -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED ON SLURM: a cluster's namespaces and daemons need root")
    installed = subprocess.run([SCRIPT, "install"], capture_output=True, text=True, timeout=400, check=False)
    if installed.returncode:
        pytest.skip(f"NOT TESTED ON SLURM: it cannot be installed here: {installed.stderr.strip()[-300:]}")
    with tempfile.TemporaryDirectory(prefix="seer-", dir="/tmp") as folder:  # short: unix sockets lie below it
        cluster = Cluster(Path(folder) / "slurm")
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.clean()


@pytest.fixture
def cluster(_two_nodes: Cluster) -> Iterator[Cluster]:
    """A login node's view of two idle nodes, n1 and n2, with two cores each."""
    yield _two_nodes
    _two_nodes.tidy()
