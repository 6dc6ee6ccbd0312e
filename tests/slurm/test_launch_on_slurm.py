"""`seer launch launch=slurm` on two nodes: whatever happens to the job, its losses are those of two processes here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from slurm.cluster import Cluster, until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

STEPS = 70
SETTINGS = (
    "experiment=demo",
    "data.workers=0",
    "data.large.size=64",
    "data.small.size=24",
    "data.small.count=2",
    "objective.prototypes=8",
    "objective.freeze_prototypes_steps=1",
    f"train.steps={STEPS}",
    "train.global_batch_size=16",
    "train.threads=1",
    "train.log_every_steps=1",
    "train.precision=fp64",
    "checkpoint.every_steps=5",
    "evaluation.every_steps=0",
    "parallel.timeout_seconds=60",  # on a busy machine processes start seconds apart
)


@pytest.fixture(scope="module")
def expected(_two_nodes: Cluster, shards: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses, step by step, of two processes on this machine."""
    run_dir = tmp_path_factory.mktemp("local") / "run"
    launch(_two_nodes, run_dir, shards, "launch=local", "launch.gpus_per_node=2", "--wait")
    return losses(run_dir)


def launch(cluster: Cluster, run_dir: Path, shards: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "seer", "launch", *SETTINGS, f"data.shards={shards}", f"run_dir={run_dir}", *words)
    return cluster.run(*command, seconds=400)


def on_two_nodes(cluster: Cluster, run_dir: Path, shards: str, *words: str) -> int:
    """Launches one process on each node; the job's number."""
    both = ("launch=slurm", "launch.nodes=2", "launch.gpus_per_node=1")
    said = launch(cluster, run_dir, shards, *both, *words).stdout
    job = re.search(r"^started +job (\d+) \(2 nodes", said)
    assert job, said
    return int(job[1])


def losses(run_dir: Path) -> list[float]:
    """Of every step, each of which was logged once."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def until_step(run_dir: Path, step: int) -> None:
    metrics = run_dir / "metrics.jsonl"

    def look() -> bool:
        return metrics.exists() and metrics.read_bytes().count(b"\n") >= step

    until(look, seconds=120, what=f"step {step} was not reached")


def hosts(run_dir: Path) -> set[str]:
    """Where submitit says that the ranks ran."""
    logs = "".join(file.read_text() for file in (run_dir / "launch").glob("*_log.out"))
    return set(re.findall(r"hostname=(\w+)", logs))


def test_two_nodes_train_as_two_processes_here(
    cluster: Cluster, shards: str, expected: list[float], tmp_path: Path
) -> None:
    number = on_two_nodes(cluster, tmp_path / "run", shards, "launch.time_limit_minutes=10", "--wait")
    assert losses(tmp_path / "run") == expected
    assert hosts(tmp_path / "run") == {"n1", "n2"}
    assert cluster.job(number)["Restarts"] == "0"


def test_time_limit_is_outlived(cluster: Cluster, shards: str, expected: list[float], tmp_path: Path) -> None:
    """16 seconds are for the run, which needs longer; `--wait` stays for all lives of the job."""
    short = ("launch.time_limit_minutes=1", "launch.stop_before_end_seconds=44")
    number = on_two_nodes(cluster, tmp_path / "run", shards, *short, "--wait")
    assert int(cluster.wait_for(number, "COMPLETED")["Restarts"]) >= 1
    assert losses(tmp_path / "run") == expected


def test_requeue_goes_on(cluster: Cluster, shards: str, expected: list[float], tmp_path: Path) -> None:
    number = on_two_nodes(cluster, tmp_path / "run", shards, "launch.time_limit_minutes=10")
    until_step(tmp_path / "run", 12)
    cluster.run("scontrol", "requeue", str(number))
    assert cluster.wait_for(number, "COMPLETED", seconds=300)["Restarts"] == "1"
    assert losses(tmp_path / "run") == expected


def test_preemption_goes_on(cluster: Cluster, shards: str, expected: list[float], tmp_path: Path) -> None:
    """A job of the partition of higher priority takes both nodes for a few seconds."""
    number = on_two_nodes(cluster, tmp_path / "run", shards, "launch.time_limit_minutes=10", "launch.partition=low")
    until_step(tmp_path / "run", 12)
    both_nodes = ("--partition=main", "--nodes=2", "--ntasks-per-node=2")
    other = cluster.submit("sleep 5", *both_nodes, folder=tmp_path)
    assert cluster.wait_for(number, "COMPLETED", seconds=300)["Restarts"] == "1"
    assert cluster.job(other)["JobState"] == "COMPLETED"
    assert losses(tmp_path / "run") == expected


@pytest.mark.parametrize("node", [2, 1])
def test_power_cut_goes_on(cluster: Cluster, shards: str, expected: list[float], tmp_path: Path, node: int) -> None:
    """Node 1 holds rank 0, the run's lock and the job's script."""
    number = on_two_nodes(cluster, tmp_path / "run", shards, "launch.time_limit_minutes=10")
    until_step(tmp_path / "run", 12)
    cluster.node_down(node)
    until(lambda: cluster.job(number)["Restarts"] == "1", seconds=120, what=f"the loss of n{node} is not noticed")
    cluster.node_up(node)
    cluster.wait_for(number, "COMPLETED", seconds=300)
    assert losses(tmp_path / "run") == expected
