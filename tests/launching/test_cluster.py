"""Whether a run fits on a cluster, from what sinfo shows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from slurm_stubs import NO_GPUS, Programs, configured

from seer.errors import UserError
from seer.launching import cluster
from seer.launching.placement import Placement


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    programs = Programs(tmp_path / "bin", monkeypatch)
    programs.cluster()
    return programs


def place(*words: str) -> Placement:
    return cluster.place(configured("launch.name=slurm", *words))


def test_partitions(programs: Programs) -> None:
    found = cluster.partitions()
    assert {name: its.nodes for name, its in found.items()} == {
        "gpu": Counter({(8, 64): 2, (4, 96): 1}),
        "cpu": Counter({(0, 16): 9, (0, 32): 1}),
        "short": Counter({(1, 8): 1}),
    }
    assert [name for name, its in found.items() if its.is_default] == ["gpu"]
    assert [its.minutes for its in found.values()] == [2880, None, 30]
    # Numbers as they are, and no line for nodes that differ: sinfo writes 1K and 64+ otherwise.
    assert programs.calls("sinfo") == [["-h", "--exact", "--noconvert", "-o", "%P|%D|%G|%l|%c"]]


@pytest.mark.parametrize(
    ("resources", "gpus"),
    [
        ("(null)", 0),
        ("gpu:8", 8),
        ("gpu:a100:8(S:0-1)", 8),
        ("gpu:tesla:2(S:0,2),gpu:kepler:1,nvme:4", 3),
        ("nvme:4", 0),
        ("gpu", 1),
        ("gpux:3", 0),
    ],
)
def test_gpus_of_a_node(programs: Programs, resources: str, gpus: int) -> None:
    programs.add("sinfo", f"p*|1|{resources}|1:30:00|2\n")
    assert cluster.partitions()["p"].nodes == Counter({(gpus, 2): 1})
    assert cluster.partitions()["p"].minutes == 90


@pytest.mark.parametrize(
    ("words", "placement"),
    [
        ([], Placement(1, 8, gpus=True)),
        (["launch.nodes=3"], Placement(3, 4, gpus=True)),
        (["launch.nodes=2", "launch.gpus_per_node=2"], Placement(2, 2, gpus=True)),
        (["launch.partition=cpu", "train.device=cpu", "launch.nodes=10"], Placement(10, 2, gpus=False)),
        (["train.device=cpu", "launch.gpus_per_node=16"], Placement(1, 16, gpus=False)),
        (["parallel.strategy=single"], Placement(1, 1, gpus=True)),
        (["launch.nodes=2", "launch.cpus_per_gpu=8"], Placement(2, 8, gpus=True)),
        (["launch.nodes=3", "launch.cpus_per_gpu=16"], Placement(3, 4, gpus=True)),
        (["launch.gpus_per_node=4", "launch.cpus_per_gpu=24"], Placement(1, 4, gpus=True)),
        (
            ["launch.partition=cpu", "train.device=cpu", "launch.gpus_per_node=16", "launch.cpus_per_gpu=2"],
            Placement(1, 16, gpus=False),
        ),
        (
            ["launch.partition=gpu,short", "launch.gpus_per_node=1", "launch.time_limit_minutes=30"],
            Placement(1, 1, True),
        ),
    ],
)
def test_what_fits(programs: Programs, words: list[str], placement: Placement) -> None:
    assert place(*words) == placement


def test_a_cluster_that_shows_no_gpu_runs_cpu_processes(programs: Programs) -> None:
    programs.add("sinfo", NO_GPUS)
    assert place("launch.nodes=2") == Placement(2, 2, gpus=False)
    assert place("launch.gpus_per_node=3") == Placement(1, 3, gpus=False)
    with pytest.raises(UserError, match="no GPU on this cluster"):
        place("train.device=cuda")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch.partition=gpus"], "launch.partition=gpus: .* did you mean 'gpu'"),
        (["launch.partition=gpu,shrt"], "launch.partition=shrt: .* did you mean 'short'"),
        (
            ["launch.partition=cpu"],
            "partition cpu has no GPUs: .* gpu, short; use launch.partition=gpu, or train.device",
        ),
        (["launch.gpus_per_node=9"], "launch.gpus_per_node=9: the largest node of partition gpu has 8 GPUs"),
        (["launch.nodes=4"], "launch.nodes=4: partition gpu has 2 nodes with 8 GPUs; use launch.nodes=2 or less"),
        (
            ["launch.nodes=3", "launch.gpus_per_node=5"],
            "launch.nodes=3: partition gpu has 2 nodes with 5 GPUs; use .*=2",
        ),
        (["launch.nodes=11", "launch.partition=cpu", "train.device=cpu"], "partition cpu has 10 nodes; use"),
        (
            ["launch.cpus_per_gpu=9"],
            "launch.cpus_per_gpu=9 with 1 node x 8 GPUs: .* partition gpu that would do has 64 cores; use .*=8 or less",
        ),
        (
            ["launch.nodes=2", "launch.gpus_per_node=4", "launch.cpus_per_gpu=24"],
            "launch.nodes=2: partition gpu has 1 node with 4 GPUs and 96 cores; use launch.nodes=1 or less",
        ),
        (
            ["launch.partition=cpu", "train.device=cpu", "launch.gpus_per_node=33"],
            "gpus_per_node=33: each process computes on a core of its own, and .* cpu has 32 cores; use .*=32 or less",
        ),
        (
            ["launch.partition=cpu", "train.device=cpu", "launch.gpus_per_node=33", "launch.cpus_per_gpu=4"],
            "gpus_per_node=33: each process computes on 4 cores of its own, .* has 32 cores; use .*=8 or less",
        ),
        (
            ["launch.partition=cpu", "train.device=cpu", "launch.cpus_per_gpu=99"],
            "launch.cpus_per_gpu=99 with 1 node x 2 CPU processes: the largest node .* has 32 cores; use .*=16 or less",
        ),
        (
            ["launch.partition=cpu", "train.device=cpu", "launch.gpus_per_node=32", "launch.nodes=2"],
            "launch.nodes=2: partition cpu has 1 node with 32 cores; use launch.nodes=1",
        ),
        (["launch.time_limit_minutes=2881"], "time_limit_minutes=2881: .* at most 2880 minutes"),
        (["launch.partition=short"], "partition short runs jobs of at most 30 minutes; use .*=30"),
    ],
)
def test_what_does_not_fit_is_told(programs: Programs, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        place(*words)


def test_the_partition_of_the_environment_counts(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "cpu")
    with pytest.raises(UserError, match="partition cpu has no GPUs"):
        place()


def test_no_default_partition(programs: Programs) -> None:
    programs.add("sinfo", "a|1|(null)|infinite|2\nb|1|(null)|infinite|2\n")
    with pytest.raises(UserError, match=r"launch.partition is not given: .* choose one of: a, b"):
        place()


@pytest.mark.parametrize("missing", ["sbatch", "srun", "sinfo", "squeue"])
def test_no_slurm(programs: Programs, missing: str) -> None:
    (programs.folder / missing).unlink()
    with pytest.raises(UserError, match=f"{missing} is not on PATH: .* launch=local"):
        place()


def test_a_controller_that_does_not_answer(programs: Programs) -> None:
    programs.add("sinfo", complains="slurm_load_partitions: Unable to contact\nslurm controller\n", code=1)
    with pytest.raises(UserError, match=r"sinfo failed \(slurm_load_partitions: Unable to contact slurm controller\)"):
        place()
