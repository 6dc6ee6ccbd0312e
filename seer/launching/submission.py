"""A run as a SLURM job: submitted through submitit, followed by squeue.

One task of srun is one rank; no agent stands between SLURM and the ranks.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seer.config import LaunchConfig
from seer.errors import UserError
from seer.launching.folder import LaunchFolder, network_variables, without_rank_variables
from seer.launching.placement import Placement
from seer.launching.tail import Tail

if TYPE_CHECKING:
    from submitit import SlurmExecutor

_POLL_SECONDS = 2.0
# A finished job stays visible for minutes; a requeued one is PENDING again under the same number.
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING")
_FINAL = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
)


def text(launch: LaunchConfig, folder: LaunchFolder, placement: Placement) -> str:
    """What `submit` hands to sbatch, letter for letter."""
    executor = _executor(launch, folder, placement)
    # submitit shows the text only after it has submitted it. These two methods are what its executors for other
    # schedulers override, and what `submit` itself writes to the file; they are called in this one place.
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit(
    launch: LaunchConfig, folder: LaunchFolder, placement: Placement, run_frozen: Callable[[str], object]
) -> str:
    """Puts the run into the queue; returns the number of the job.

    Args:
        run_frozen: a function of a module (the job imports it from the frozen code), called with the path of the frozen
            configuration.

    Raises:
        UserError: sbatch refused the job.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = _executor(launch, folder, placement)
    with _environment_of_sbatch(executor.parameters):
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints a refusal before it raises it
                return executor.submit(run_frozen, str(folder.config)).job_id
        except (FailedJobError, FailedSubmissionError) as error:
            said = [line.removeprefix("sbatch: ") for line in str(error).splitlines() if line.startswith("sbatch: ")]
            raise UserError(
                f"sbatch refused the job ({' '.join(said) or ' '.join(str(error).split())})",
                "SLURM checks account, quality of service and resources when a job is submitted",
                "change the launch keys that it names (`seer launch --help`)",
            ) from None


def refuse_queued(folder: LaunchFolder) -> None:
    """Refuses a run that has a job in the queue already: that one would start with our files, or beside us.

    Raises:
        UserError: with the number of the job.
    """
    submitted = jobs_of(folder)
    queue = queued_jobs() if submitted else None
    for job in submitted:
        if queue and job in queue:
            raise UserError(
                f"{folder.run_dir} is in use by job {job} ({queue[job]})",
                "one job at a time writes into a run",
                f"wait for it, or end it with: scancel {job}",
            )


def jobs_of(folder: LaunchFolder) -> list[str]:
    """Numbers of the jobs that this user submitted for a run, the newest last."""
    numbers = []
    for file in folder.folder.glob("*_submission.sh"):
        number = file.name.partition("_")[0]
        with contextlib.suppress(OSError):
            if number.isdecimal() and file.stat().st_uid == os.getuid():
                numbers.append(int(number))
    return [str(number) for number in sorted(numbers)]


def queued_jobs(patience_seconds: float | None = None) -> dict[str, str] | None:
    """The jobs of this user that are not over: number -> state; None where there is no SLURM or it does not answer."""
    if shutil.which("squeue") is None:
        return None
    try:
        done = subprocess.run(
            ["squeue", "-h", "--me", "-o", "%i|%T|%r"],
            capture_output=True,
            text=True,
            timeout=patience_seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    states = (line.split("|") for line in done.stdout.splitlines())
    return {job: state for job, state, *_ in states if state not in _FINAL}


def is_waiting(state: str) -> bool:
    """Whether a job in this state has no process yet, or none any more."""
    return state in _WAITING


def follow(job: str, folder: LaunchFolder) -> int:
    """Shows the log of rank 0 until the job is over, requeued lives included; returns the exit code.

    What the job waits for goes to stderr. Ctrl-C leaves the job alone.
    """
    tail, before = Tail(log(folder, job)), ""
    try:
        polls_after_the_end = 0
        while polls_after_the_end < 2:  # between two lives a job may show for a moment how the first ended
            state, reason = _state(job)
            now = f"{state} ({reason})" if reason else state
            if now != before and (is_waiting(state) or state == "RUNNING"):
                print(f"seer: job {job} is {now}", file=sys.stderr, flush=True)
                before = now
            polls_after_the_end = polls_after_the_end + 1 if state in _FINAL else 0
            tail.copy()
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        print(
            f"seer: job {job} goes on; save and end it with: {stop_command(job)} "
            f"(while it is still queued: scancel {job})",
            file=sys.stderr,
        )
        return 130
    tail.copy()
    folder.tell_cause(log(folder, job))
    code = folder.exit_code()
    if code is None:
        print(f"seer: job {job} ended without saying how: see {folder.folder}/{job}_*_log.out", file=sys.stderr)
    return 1 if code is None else code


def log(folder: LaunchFolder, job: str) -> Path:
    """What rank 0 of a job says, all of its lives."""
    return folder.folder / f"{job}_0_log.out"


def stop_command(job: str) -> str:
    """The command that lets a job save and end: to the ranks only, since srun answers SIGTERM by killing them.

    SLURM refuses it for a job that waits.
    """
    return f"scancel --signal=TERM {job}"


def _state(job: str) -> tuple[str, str]:
    """State and why it waits, each empty where SLURM does not say; a job that SLURM does not know is COMPLETED."""
    done = subprocess.run(["squeue", "-h", "-o", "%T|%r", "-j", job], capture_output=True, text=True, check=False)
    if done.returncode:  # a controller that does not answer at the moment is no end of the job
        return ("COMPLETED", "") if "Invalid job id" in done.stderr else ("", "")
    state, _, reason = done.stdout.strip().partition("|")
    return state or "COMPLETED", "" if reason == "None" else reason


def _executor(launch: LaunchConfig, folder: LaunchFolder, placement: Placement) -> SlurmExecutor:
    from submitit import SlurmExecutor

    additional: dict[str, Any] = {"requeue": True}
    for option in launch.extra_sbatch:
        key, equals, value = option.partition("=")
        additional[key] = value if equals else True
    srun = ["--kill-on-bad-exit=1", "--open-mode=append", "--export=ALL"]
    if launch.cpus_per_gpu is not None:
        srun.append(f"--cpus-per-task={launch.cpus_per_gpu}")  # srun does not take it over from sbatch
    optional = {
        "gpus_per_node": placement.per_node if placement.gpus else None,
        "cpus_per_task": launch.cpus_per_gpu,
        "mem": None if launch.memory_per_node_gb is None else f"{launch.memory_per_node_gb}GB",
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "exclude": launch.exclude,
    }
    executor = SlurmExecutor(folder.folder)
    executor.update_parameters(
        job_name=launch.job_name,
        nodes=placement.nodes,
        ntasks_per_node=placement.per_node,
        time=launch.time_limit_minutes,
        signal_delay_s=launch.stop_before_end_seconds,
        wckey=None,  # submitit would write its own, which some sites refuse
        stderr_to_stdout=True,
        setup=_setup(launch, folder),
        srun_args=srun,
        additional_parameters=additional,
        **{name: value for name, value in optional.items() if value is not None},
    )
    return executor


def _setup(launch: LaunchConfig, folder: LaunchFolder) -> list[str]:
    """Shell lines before srun, in every life of the job. Ours come last: a module may change PYTHONPATH."""
    variables = {
        "SEER_LAUNCHER": "slurm",
        "SEER_STATUS_FILE": str(folder.status),
        "PYTHONSAFEPATH": "1",  # else `-m` takes the package in the folder where the job was submitted
    } | network_variables(launch.network_interface)
    return [
        *launch.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        f'export PYTHONPATH={shlex.quote(str(folder.code))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        f"rm -f {shlex.quote(str(folder.status))}",
    ]


@contextlib.contextmanager
def _environment_of_sbatch(parameters: dict[str, Any]) -> Iterator[None]:
    """The job inherits the environment of sbatch, and SBATCH_* there beat what the script says: both are cleaned."""
    before = dict(os.environ)
    names = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE"}
    ours = {f"SBATCH_{names.get(key, key.upper())}" for key in parameters}
    ours |= {"SBATCH_NO_REQUEUE", "SBATCH_OPEN_MODE", "SBATCH_SIGNAL", "SBATCH_EXPORT", "SBATCH_OUTPUT", "SBATCH_ERROR"}
    clean = {name: value for name, value in without_rank_variables(before).items() if name not in ours}
    os.environ.clear()
    os.environ.update(clean)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
