"""A SLURM cluster of two nodes as tests use it: `two-nodes.sh` behind methods, and waiting by looking."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

SCRIPT = Path(__file__).with_name("two-nodes.sh")
ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"})
T = TypeVar("T")


def until(look: Callable[[], T], *, seconds: float, what: str) -> T:
    """What `look` gives as soon as that is true; an AssertionError that says `what` after this many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"after {seconds:.0f} s: {what}"
        time.sleep(0.2)
    return found


class Cluster:
    """A cluster below a folder; `start` and `clean` enclose its use.

    Args:
        root: the cluster's folder, a short path.
        cpus: cores that each node claims.
        gpus: GPUs that each node claims; they are only numbers.
    """

    def __init__(self, root: Path, *, cpus: int = 2, gpus: int = 0) -> None:
        self.root = root
        self._command = (str(SCRIPT), "--root", str(root), "--cpus", str(cpus), "--gpus", str(gpus))

    def script(self, *words: str, seconds: float = 120) -> str:
        """Output of `two-nodes.sh WORDS`."""
        return _run([*self._command, *words], seconds=seconds, environment=None).stdout

    def start(self) -> None:
        self.script("start", seconds=300)

    def clean(self) -> None:
        self.script("clean")

    @property
    def environment(self) -> dict[str, str]:
        """Of a login node: sbatch, srun and `seer launch` reach this cluster in it, and nothing is left of a job's."""
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "SEER_", "PYTEST")) and name not in ("RANK", "WORLD_SIZE")
        }
        return clean | {"SLURM_CONF": str(self.root / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def run(
        self, *words: str | Path, seconds: float = 60, cwd: Path | None = None, code: int | None = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as on a login node; another exit code than `code` (None: any) is an AssertionError."""
        return _run([*map(str, words)], seconds=seconds, environment=self.environment, cwd=cwd, code=code)

    def submit(self, script: str, *options: str, folder: Path) -> int:
        """Queue a batch script that writes `slurm-JOB.out` into the folder; the job's number."""
        file = folder / "job.sh"
        file.write_text(f"#!/bin/bash\n{script}\n")
        output = f"--output={folder}/slurm-%j.out"
        words = ("sbatch", "--parsable", "--open-mode=append", output, *options, file)
        return int(self.run(*words, cwd=folder).stdout)

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` knows: JobState, Restarts, ExitCode, NodeList, Reason ... also of an ended job."""
        words = self.run("scontrol", "--oneliner", "show", "job", str(number)).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: int, *states: str, seconds: float = 90) -> dict[str, str]:
        """The job as soon as it is in one of these states; one that ended otherwise is an AssertionError at once."""

        def look() -> dict[str, str] | None:
            found = self.job(number)
            if found["JobState"] in states:
                return found
            assert found["JobState"] not in ENDED or found["JobState"] == "NODE_FAIL", found  # NODE_FAIL: is requeued
            return None

        return until(look, seconds=seconds, what=f"job {number} is not {' or '.join(states)}: {self.job(number)}")

    def node_down(self, node: int, how: str = "power") -> None:
        """`power`: every process of the node dies; `net`: its link is cut; `slurmd`: only its slurmd dies."""
        self.script("node-down", str(node), how)

    def node_up(self, node: int) -> None:
        self.script("node-up", str(node))

    def tidy(self) -> None:
        """Mend both nodes and cancel every job, so that the next test finds an idle cluster."""
        for node in (1, 2):
            self.node_up(node)
        self.run("scancel", "--user=root")
        until(lambda: not self.run("squeue", "--noheader").stdout, seconds=60, what="jobs are left in the queue")


def _run(
    words: list[str],
    *,
    seconds: float,
    environment: dict[str, str] | None,
    cwd: Path | None = None,
    code: int | None = 0,
) -> subprocess.CompletedProcess[str]:
    found = subprocess.run(
        words, capture_output=True, text=True, timeout=seconds, env=environment, cwd=cwd, check=False
    )
    assert code is None or found.returncode == code, (words, found.returncode, found.stdout, found.stderr)
    return found
