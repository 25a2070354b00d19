"""A real SLURM of four nodes for the session (cluster.sh), where root and its programs are; required in CI."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

HERE = Path(__file__).parent


def lacking() -> str:
    """Why there can be no cluster on this machine; empty when there can."""
    if os.geteuid() != 0:
        return "a cluster of namespaces needs root"
    if gone := [name for name in ("slurmctld", "slurmd", "sbatch", "munged", "ip") if shutil.which(name) is None]:
        return f"{', '.join(gone)} not found; apt-get install slurmctld slurmd slurm-client munge iproute2"
    if subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "this machine does not let root make namespaces"
    return ""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if why := lacking():
        if os.environ.get("CI"):
            pytest.fail(f"CI needs a SLURM: {why}")
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:  # a socket's path must be short
        number = os.getpid() % 200 + 20
        os.environ |= {
            "SLURM_TEST_DIR": folder,
            "SLURM_TEST_BRIDGE": f"slt{number}",
            "SLURM_TEST_NET": f"10.78.{number}",
            "SLURM_TEST_PORT": str(16817 + 2 * number),
            "SLURM_CONF": f"{folder}/etc/slurm.conf",
            "REAL_PYTHON": sys.executable,
        }
        made = Cluster(HERE / "cluster.sh")
        try:
            made.script("start", "4")
            yield made
        finally:
            made.script("stop")
