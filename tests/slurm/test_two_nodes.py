"""The cluster itself is what the launcher's tests take it for: two machines, requeues, and losses of nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm.cluster import Cluster, until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def lives(folder: Path, number: int) -> list[str]:
    file = folder / f"slurm-{number}.out"
    return file.read_text().splitlines() if file.exists() else []


def test_two_nodes_answer(cluster: Cluster) -> None:
    words = ("srun", "--nodes=2", "--ntasks-per-node=1", "sh", "-c")
    found = cluster.run(*words, "echo $(hostname) $SLURM_PROCID $SLURM_NTASKS; getent hosts n1 n2 | wc -l").stdout
    assert sorted(found.splitlines()) == ["2", "2", "n1 0 2", "n2 1 2"]


def test_requeue_counts_lives(cluster: Cluster, tmp_path: Path) -> None:
    number = cluster.submit("echo life ${SLURM_RESTART_COUNT:-0}; sleep 60", "--nodes=2", folder=tmp_path)
    until(lambda: lives(tmp_path, number) == ["life 0"], seconds=60, what="the job does not begin")
    cluster.run("scontrol", "requeue", str(number))
    until(lambda: "life 1" in lives(tmp_path, number), seconds=90, what="there is no second life")
    assert cluster.wait_for(number, "RUNNING")["Restarts"] == "1"


@pytest.mark.parametrize("how", ["power", "net"])
def test_a_lost_node_requeues_its_job(cluster: Cluster, tmp_path: Path, how: str) -> None:
    step = "srun sh -c 'echo life ${SLURM_RESTART_COUNT:-0}; sleep 100'"
    number = cluster.submit(step, "--nodes=2", folder=tmp_path)
    # On both nodes: an srun that cannot reach one of them ends its job, sooner than the loss of the node is noticed.
    until(lambda: lives(tmp_path, number) == ["life 0"] * 2, seconds=60, what="the job does not begin")
    cluster.node_down(2, how)
    until(lambda: cluster.job(number)["Restarts"] == "1", seconds=120, what="the loss of n2 is not noticed")
    assert "life 1" not in lives(tmp_path, number)  # it needs two nodes
    cluster.node_up(2)
    until(lambda: "life 1" in lives(tmp_path, number), seconds=90, what="there is no second life")
