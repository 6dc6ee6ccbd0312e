"""What a process of a SLURM job asks of SLURM: when the job ends, and to be queued again.

Everything here answers None outside of jobs of our own (SEER_LAUNCHER=slurm): a run that somebody started by hand in an
interactive job must not requeue that job.
"""

from __future__ import annotations

import os
import re
import subprocess
from datetime import datetime

_PATIENCE_SECONDS = 60  # a controller under load answers late


def job_id() -> str | None:
    """The number of this job, None outside of one."""
    return os.environ.get("SLURM_JOB_ID") if os.environ.get("SEER_LAUNCHER") == "slurm" else None


def cores_of_task() -> int | None:
    """Cores that SLURM gave to this process alone, None outside of a job or where nobody asked for a number."""
    text = os.environ.get("SLURM_CPUS_PER_TASK", "") if job_id() else ""
    return int(text) if text.isdecimal() else None


def job_end_time() -> float | None:
    """When SLURM will end this job, Unix seconds; None outside of a job, without a limit, or if nobody can say."""
    job = job_id()
    if job is None:
        return None
    told = os.environ.get("SLURM_JOB_END_TIME", "")
    if told.isdecimal():
        return float(told) or None
    shown, complaint = _scontrol("show", "job", "-o", job)
    end = None if complaint else re.search(r"(?:^|\s)EndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\s|$)", shown)
    return datetime.fromisoformat(end[1]).timestamp() if end else None  # SLURM writes local time


def requeue() -> str | None:
    """Queue this job again, which also ends its present life; returns why that did not work, else None."""
    job = job_id()
    if job is None:
        return "this process does not belong to a job of seer launch"
    return _scontrol("requeue", job)[1]


def _scontrol(*words: str) -> tuple[str, str | None]:
    """Its output, and why it failed."""
    try:
        done = subprocess.run(
            ["scontrol", *words], capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False
        )
    except OSError as error:
        return "", f"scontrol: {error.strerror}"
    except subprocess.TimeoutExpired:
        return "", f"scontrol did not answer within {_PATIENCE_SECONDS} seconds"
    if done.returncode == 0:
        return done.stdout, None
    return "", " ".join(done.stderr.split()) or f"scontrol ended with {done.returncode}"
