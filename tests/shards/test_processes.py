import operator
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seer.errors import UserError
from seer.shards.processes import each

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_every_job_comes_back_with_its_result(workers: int) -> None:
    jobs = list(range(20))
    assert sorted(each(operator.neg, jobs, workers)) == [(job, -job) for job in jobs]


def test_one_job_stays_in_this_process() -> None:
    ((_, result),) = each(eval, ["__import__('os').getpid()"], 8)
    assert result == os.getpid()


def test_an_error_of_a_job_is_raised_here() -> None:
    with pytest.raises(ZeroDivisionError):
        list(each(eval, ["1", "1 / 0", "2"], 2))


def test_a_worker_that_was_killed_is_told() -> None:
    with pytest.raises(UserError, match="a worker process was killed"):
        list(each(eval, ["__import__('os')._exit(9)"] * 2, 2))


FOREVER = """
from seer.shards.processes import each
if __name__ == "__main__":
    for _, pid in each(eval, ["[__import__('time').sleep(0.1), __import__('os').getpid()][1]"] * 10_000, 2):
        print(pid, flush=True)
"""


def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "forever.py").write_text(FOREVER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "forever.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        workers = {int(process.stdout.readline()) for _ in range(5)}
        process.kill()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() and _runs(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return "forkserver" in Path(f"/proc/{pid}/cmdline").read_text()  # empty for a zombie
    except OSError:
        return False
