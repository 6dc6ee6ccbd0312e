"""What a job asks of SLURM: its end, its number, to be queued again."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import pytest
from slurm_stubs import Programs

from seer.launching import slurm

SHOWN = "JobId=17 JobName=seer RunTime=00:01:00 StartTime=2024-05-01T10:00:00 EndTime={} Deadline=N/A Partition=gpu\n"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    programs = Programs(tmp_path / "bin", monkeypatch)
    for name in ("SLURM_JOB_END_TIME", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SEER_LAUNCHER", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return programs


def test_outside_of_our_jobs_nothing_is_known_and_nothing_requeued(
    programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEER_LAUNCHER")
    programs.add("scontrol", SHOWN.format("2024-05-01T12:00:00"))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1700000000")
    assert slurm.job_id() is None and slurm.job_end_time() is None and slurm.cores_of_task() is None
    assert slurm.requeue() is not None
    assert programs.calls("scontrol") == []


def test_the_end_as_the_environment_tells_it(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    programs.add("scontrol")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1700000000")
    assert slurm.job_end_time() == 1700000000.0
    assert programs.calls("scontrol") == []


def test_the_end_as_scontrol_tells_it_is_local_time(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    programs.add("scontrol", SHOWN.format("2024-05-01T12:00:00"))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert slurm.job_end_time() == datetime.fromisoformat("2024-05-01T12:00:00+09:00").timestamp()
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()
    assert programs.calls("scontrol") == [["show", "job", "-o", "17"]]


@pytest.mark.parametrize("end", ["Unknown", "N/A"])
def test_a_job_without_a_limit_has_no_end(programs: Programs, end: str) -> None:
    programs.add("scontrol", SHOWN.format(end))
    assert slurm.job_end_time() is None


def test_without_scontrol_the_end_is_unknown(programs: Programs) -> None:
    assert slurm.job_end_time() is None


def test_requeue(programs: Programs) -> None:
    programs.add("scontrol")
    assert slurm.requeue() is None
    assert programs.calls("scontrol") == [["requeue", "17"]]


@pytest.mark.parametrize("there", [True, False])
def test_why_it_was_not_requeued(programs: Programs, there: bool) -> None:
    if there:
        programs.add("scontrol", complains="Requested operation\nis disabled\n", code=1)
    reason = slurm.requeue()
    assert reason == ("Requested operation is disabled" if there else "scontrol: No such file or directory")


def test_cores_of_a_task(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm.cores_of_task() is None and slurm.job_id() == "17"
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert slurm.cores_of_task() == 6
