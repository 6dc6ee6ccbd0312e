"""The lock of a run: whose it is, when it is stale, and what can be done about one that cannot be judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seer.errors import UserError
from seer.run_lock import RunLock, host_of_holder, in_use


def held_elsewhere(file: Path, **more: object) -> None:
    file.write_text(json.dumps({"host": "n1", "boot": "b", "pid": 7, "started": 1, "token": "t"} | more) + "\n")


def test_a_lock_of_another_machine_is_taken_only_if_the_user_says_so(tmp_path: Path) -> None:
    file = tmp_path / "run.lock"
    held_elsewhere(file)
    assert host_of_holder(file) == "n1"
    for words in (str(in_use(file)), "process 7 on n1", "add --take-over"):
        with pytest.raises(UserError, match="process 7 on n1") as caught:
            RunLock.take(file)
        assert words in str(caught.value)
    lock = RunLock.take(file, take_over=True)
    assert lock.still_held()
    lock.release()
    assert not file.exists() and host_of_holder(file) is None and in_use(file) is None


def test_take_over_is_not_for_a_process_of_this_machine_that_lives(tmp_path: Path) -> None:
    lock = RunLock.take(tmp_path / "run.lock")
    with pytest.raises(UserError, match="is in use by process"):
        RunLock.take(tmp_path / "run.lock", take_over=True)
    assert lock.still_held()


@pytest.mark.parametrize(
    ("held", "own_job", "restart", "taken"),
    [
        ({"job": "17", "restart": 0}, "17", "1", True),  # the cluster ended the first life before this one began
        ({"job": "17", "restart": 1}, "17", "1", False),  # a rank of the same life
        ({"job": "16", "restart": 0}, "17", "1", False),
        ({}, "17", "1", False),
    ],
)
def test_a_job_that_was_started_again_owns_what_it_held(
    tmp_path: Path, held: dict[str, object], own_job: str, restart: str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.lock"
    held_elsewhere(file, **held)
    for name, value in {"SLURM_JOB_ID": own_job, "SLURM_RESTART_COUNT": restart, "SEER_LAUNCHER": "slurm"}.items():
        monkeypatch.setenv(name, value)
    if not taken:
        with pytest.raises(UserError):
            RunLock.take(file)
        return
    lock = RunLock.take(file)
    assert json.loads(file.read_text())["restart"] == 1
    held_elsewhere(file)  # somebody else took it over
    assert not lock.still_held()
    lock.release()
    assert file.exists(), "what is not ours is left alone"


def test_a_job_counts_only_where_our_launcher_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.lock"
    held_elsewhere(file, job="17", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.delenv("SEER_LAUNCHER", raising=False)
    with pytest.raises(UserError):
        RunLock.take(file)
