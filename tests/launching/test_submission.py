"""A run as a SLURM job: the text that sbatch gets, letter for letter, and what happens around it."""

from __future__ import annotations

import dataclasses
import os
import pickle
import sys
from pathlib import Path

import pytest
from slurm_stubs import Programs, configured

from seer.config import LaunchConfig
from seer.errors import UserError
from seer.launching import submission
from seer.launching.folder import LaunchFolder
from seer.launching.placement import Placement

GOLDEN = Path(__file__).parent / "golden.sbatch"
EVERYTHING = LaunchConfig(
    name="slurm",
    nodes=2,
    gpus_per_node=8,
    cpus_per_gpu=12,
    memory_per_node_gb=500,
    partition="gpu",
    account="vision",
    qos="long",
    constraint="a100&ib",
    exclude="n[003-004]",
    time_limit_minutes=240,
    stop_before_end_seconds=300,
    job_name="seer 256gf",
    network_interface="ib0",
    setup=["module load cuda"],
    extra_sbatch=["reservation=spring", "exclusive"],
)
EIGHT = Placement(2, 8, gpus=True)


def run_frozen(path: str) -> None:
    """What a test submits: a function of a module, as `seer.cli.train.run_frozen` is."""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    programs = Programs(tmp_path / "bin", monkeypatch)
    programs.cluster()
    monkeypatch.setattr(submission, "_POLL_SECONDS", 0.01)
    return programs


@pytest.fixture
def folder(tmp_path: Path) -> LaunchFolder:
    return LaunchFolder(tmp_path / "a run")


def test_the_text_is_golden(programs: Programs, folder: LaunchFolder) -> None:
    """Read by eye against sbatch(1) and srun(1) when it was made; a change must be meant."""
    text = submission.text(EVERYTHING, folder, EIGHT)
    assert text.replace(str(folder.run_dir), "/RUN DIR").replace(sys.executable, "PYTHON") == GOLDEN.read_text()
    assert not folder.run_dir.exists()


def test_what_is_printed_is_what_is_submitted(programs: Programs, folder: LaunchFolder) -> None:
    text = submission.text(EVERYTHING, folder, EIGHT)
    with folder.frozen(configured()):
        assert submission.submit(EVERYTHING, folder, EIGHT, run_frozen) == "17"
    assert (folder.folder / "17_submission.sh").read_text() == text
    ((script,),) = programs.calls("sbatch")
    assert Path(script).resolve() == folder.folder / "17_submission.sh"


def test_the_job_is_a_function_by_name_and_the_path(programs: Programs, folder: LaunchFolder) -> None:
    from seer.cli.train import run_frozen as of_the_product

    with folder.frozen(configured()):
        submission.submit(LaunchConfig(), folder, EIGHT, of_the_product)
    submitted = folder.folder / "17_submitted.pkl"
    delayed = pickle.loads(submitted.read_bytes())
    assert delayed.function is of_the_product and delayed.args == (str(folder.config),) and delayed.kwargs == {}
    assert submitted.stat().st_size < 1000, "by value, the job would not run the frozen code"


def test_by_default_the_cluster_decides(programs: Programs, folder: LaunchFolder) -> None:
    text = submission.text(LaunchConfig(), folder, Placement(1, 2, gpus=False))
    options = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert [option.partition("=")[0] for option in options] == [
        *("job-name", "nodes", "ntasks-per-node", "open-mode", "output", "requeue", "signal", "time")
    ]
    assert "SOCKET_IFNAME" not in text and "cpus" not in text


def test_what_the_shell_left_over_does_not_reach_the_job(
    programs: Programs, folder: LaunchFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """sbatch takes its environment along, and SBATCH_ variables beat the options in the script."""
    names = ("RANK", "MASTER_ADDR", "SLURM_PROCID", "SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SLURM_CONF", "SBATCH_QOS")
    for name in names:
        monkeypatch.setenv(name, "left over")
    seen = tmp_path / "seen"
    programs.add("sbatch", "Submitted batch job 17\n", first="\n".join(f'echo "${n}" >>{seen}' for n in names))
    with folder.frozen(configured()):
        submission.submit(dataclasses.replace(EVERYTHING, qos=None), folder, EIGHT, run_frozen)
    assert seen.read_text().splitlines() == ["", "", "", "", "", "left over", "left over"]
    assert os.environ["RANK"] == "left over"


def test_a_refusal_is_one_line(programs: Programs, folder: LaunchFolder, capfd: pytest.CaptureFixture[str]) -> None:
    said = "sbatch: error: Batch job submission failed:\nsbatch: error: Invalid account or account/partition\n"
    programs.add("sbatch", complains=said, code=1)
    with (
        pytest.raises(UserError, match=r"^sbatch refused the job \(error: .*Invalid account or account/partition\)"),
        folder.frozen(configured()),
    ):
        submission.submit(EVERYTHING, folder, EIGHT, run_frozen)
    assert not folder.run_dir.exists()
    assert capfd.readouterr() == ("", ""), "the line is all that is said"


@pytest.mark.parametrize(
    ("queue", "refused"),
    [
        ("17|PENDING|Resources\n", True),
        ("9|RUNNING|None\n17|RUNNING|None\n", True),
        ("17|COMPLETED|None\n", False),
        ("9|RUNNING|None\n117|RUNNING|None\n", False),
        ("", False),
    ],
)
def test_a_run_whose_job_is_in_the_queue_is_in_use(
    programs: Programs, folder: LaunchFolder, queue: str, refused: bool
) -> None:
    folder.folder.mkdir(parents=True)
    submission.refuse_queued(folder)
    assert programs.calls("squeue") == [], "a new run has no job"
    (folder.folder / "17_submission.sh").touch()
    programs.add("squeue", queue)
    if not refused:
        submission.refuse_queued(folder)
        return
    with pytest.raises(UserError, match=r"is in use by job 17 \((PENDING|RUNNING)\): .* scancel 17"):
        submission.refuse_queued(folder)


@pytest.mark.parametrize("gone", ["says nothing", "Invalid job id", "COMPLETED", "TIMEOUT"])
def test_a_job_is_followed_through_its_lives(
    programs: Programs, folder: LaunchFolder, capsys: pytest.CaptureFixture[str], gone: str
) -> None:
    """PENDING, RUNNING, requeued, a controller that does not answer, RUNNING, and then no more."""
    folder.folder.mkdir(parents=True)
    log, status, calls = submission.log(folder, "17"), folder.status, programs.folder / "squeue.calls"
    end = {
        "says nothing": "exit 0",
        "Invalid job id": "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
    }
    first = f"""
        n=0; while read -r line; do n=$((n + 1)); done <'{calls}'
        case $n in
        1) echo 'PENDING|None'; exit 0 ;;
        2 | 3) echo 'PENDING|Resources'; exit 0 ;;
        4) echo 'RUNNING|None'; echo life 1 >>'{log}'; echo '{{"exit_code": 75}}' >'{status}'; exit 0 ;;
        5) echo 'NODE_FAIL|None'; exit 0 ;;
        6) echo 'PENDING|BeginTime'; exit 0 ;;
        7 | 8) echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1 ;;
        9 | 10) echo 'RUNNING|None'; exit 0 ;;
        11) echo 'COMPLETING|None'; echo life 2 >>'{log}'; echo '{{"exit_code": 0}}' >'{status}'; exit 0 ;;
        *) {end.get(gone, f"echo '{gone}|None'; exit 0")} ;;
        esac"""
    programs.add("squeue", first=first)
    assert submission.follow("17", folder) == 0
    out, error = capsys.readouterr()
    assert out == "life 1\nlife 2\n"
    assert error.splitlines() == [
        "seer: job 17 is PENDING",
        "seer: job 17 is PENDING (Resources)",
        "seer: job 17 is RUNNING",
        "seer: job 17 is PENDING (BeginTime)",
        "seer: job 17 is RUNNING",
    ]
    assert programs.calls("squeue") == [["-h", "-o", "%T|%r", "-j", "17"]] * 13


def test_a_job_that_ends_without_a_word_is_exit_code_1(
    programs: Programs, folder: LaunchFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submission.follow("17", folder) == 1
    assert "17_*_log.out" in capsys.readouterr().err


def test_ctrl_c_leaves_the_job_alone(
    programs: Programs, folder: LaunchFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    programs.add("squeue", "RUNNING|None\n")
    programs.add("scancel")

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submission.time, "sleep", interrupt)
    assert submission.follow("17", folder) == 130
    said = capsys.readouterr().err
    assert (
        "job 17 goes on; save and end it with: scancel --signal=TERM 17 (while it is still queued: scancel 17)" in said
    )
    assert programs.calls("scancel") == []
