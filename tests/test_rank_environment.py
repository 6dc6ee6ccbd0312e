"""Who a process is, from what torchrun and SLURM set; SLURM's only where our launcher says so."""

from __future__ import annotations

import pytest

from seer.errors import UserError
from seer.rank_environment import RankEnvironment, rank_environment

TORCHRUN = {
    **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "host0", "MASTER_PORT": "29501"},
}
# Of task 3 of a step of five on n001, n002 (two each) and n007.
SLURM = {
    **{"SEER_LAUNCHER": "slurm", "SLURM_PROCID": "3", "SLURM_NTASKS": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"},
    **{"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "n[001-002,007]", "SLURM_JOB_ID": "123456"},
}


def test_one_process_by_itself() -> None:
    assert rank_environment({}) is None


def test_torchrun() -> None:
    assert rank_environment(TORCHRUN) == RankEnvironment(3, 4, 1, 2, "host0", 29501)


def test_slurm() -> None:
    assert rank_environment(SLURM) == RankEnvironment(3, 5, 1, 2, "n001", 23456)


def test_slurm_counts_only_where_the_launcher_says_so() -> None:
    """A python in a batch script, or in somebody's interactive job, has SLURM's variables too."""
    assert rank_environment({name: value for name, value in SLURM.items() if name != "SEER_LAUNCHER"}) is None


def test_torchrun_inside_of_a_job_comes_first() -> None:
    assert rank_environment(SLURM | TORCHRUN) == rank_environment(TORCHRUN)


@pytest.mark.parametrize(
    ("restart", "job", "port"),
    [("0", "123456", 23456), ("1", "123456", 23463), ("2", "9999", 20013), ("3", "10000", 20021)],
)
def test_each_life_of_a_job_has_its_own_port_below_the_ephemeral_ones(restart: str, job: str, port: int) -> None:
    found = rank_environment(SLURM | {"SLURM_RESTART_COUNT": restart, "SLURM_JOB_ID": job})
    assert found is not None and found.master_port == port


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("login,n[1-4]", "login"),
        ("a[001-003,7],b,c[1-2]-x[0-1]", "a001"),
        ("c[09-12,20]-x[3,5]", "c09-x3"),
        ("gpu-a[12]", "gpu-a12"),
        ("n1.cluster.org,n2.cluster.org", "n1.cluster.org"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    found = rank_environment(SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert found is not None and found.master_addr == first


@pytest.mark.parametrize(
    ("tasks", "node", "local"),
    [("2(x2),1", "2", 1), ("5", "0", 5), ("1,4", "1", 4), ("2(x3),4(x2)", "3", 4), ("2(x3),4(x2)", "2", 2)],
)
def test_tasks_of_this_node(tasks: str, node: str, local: int) -> None:
    environ = SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node, "SLURM_LOCALID": "0"}
    found = rank_environment(environ)
    assert found is not None and found.local_world_size == local


@pytest.mark.parametrize(
    ("start", "name", "value"),
    [
        (TORCHRUN, "RANK", "x"),
        (TORCHRUN, "RANK", "4"),
        (TORCHRUN, "RANK", "-1"),
        (TORCHRUN, "WORLD_SIZE", ""),
        (TORCHRUN, "LOCAL_RANK", "2"),
        (TORCHRUN, "LOCAL_WORLD_SIZE", "5"),
        (TORCHRUN, "MASTER_PORT", "1e4"),
        (SLURM, "SLURM_PROCID", "5"),
        (SLURM, "SLURM_PROCID", "one"),
        (SLURM, "SLURM_NTASKS", "2x"),
        (SLURM, "SLURM_LOCALID", "2"),
        (SLURM, "SLURM_NODEID", "3"),
        (SLURM, "SLURM_STEP_TASKS_PER_NODE", "2(x2"),
        (SLURM, "SLURM_STEP_TASKS_PER_NODE", ""),
        (SLURM, "SLURM_STEP_TASKS_PER_NODE", "9(x9)"),
        (SLURM, "SLURM_STEP_NODELIST", "n[1-2"),
        (SLURM, "SLURM_STEP_NODELIST", "n[]"),
        (SLURM, "SLURM_STEP_NODELIST", "n1,"),
        (SLURM, "SLURM_JOB_ID", "17_3"),
        (SLURM, "SLURM_RESTART_COUNT", "?"),
    ],
)
def test_what_is_malformed_is_named(start: dict[str, str], name: str, value: str) -> None:
    with pytest.raises(UserError) as error:
        rank_environment(start | {name: value})
    assert f"{name}={value}:" in str(error.value)


@pytest.mark.parametrize("port", ["0", "65536"])
def test_a_port_that_does_not_exist(port: str) -> None:
    with pytest.raises(UserError, match=f"MASTER_PORT={port}: it is a port, 1 to 65535"):
        rank_environment({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": port})


@pytest.mark.parametrize("name", [name for name in SLURM if name not in ("SEER_LAUNCHER", "SLURM_NODEID")])
def test_what_is_missing_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is not set: .* srun"):
        rank_environment({key: value for key, value in SLURM.items() if key != name})
