"""The scripts for launching by hand: what they start, with which arguments, and that they wait for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_stubs import Programs

ROOT = Path(__file__).parents[2]
TORCHRUN, SLURM = ROOT / "launch" / "torchrun.sh", ROOT / "launch" / "slurm.sh"
WORDS = ["experiment=small", "data.shards=/a b/*.tar", "run_dir=r"]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """In front of those of the machine: the scripts use grep and the like."""
    path = os.environ["PATH"]
    programs = Programs(tmp_path / "bin", monkeypatch)
    monkeypatch.setenv("PATH", f"{programs.folder}{os.pathsep}{path}")
    monkeypatch.setenv("HOME", str(tmp_path))  # no start-up files of a shell
    for name in ("NODES", "NODE", "MASTER", "PORT", "PROCESSES", "INTERFACE", "SLURM_CPUS_PER_TASK", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    programs.add("nvidia-smi", code=9)
    return programs


def run(script: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([script, *words], env=os.environ | variables, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("gpus", "variables", "where"),
    [
        (0, {}, ["--standalone", "--nproc-per-node", "2"]),
        (3, {}, ["--standalone", "--nproc-per-node", "3"]),
        (3, {"CUDA_VISIBLE_DEVICES": "0,2"}, ["--standalone", "--nproc-per-node", "2"]),
        (3, {"CUDA_VISIBLE_DEVICES": "-1"}, ["--standalone", "--nproc-per-node", "2"]),
        (3, {"PROCESSES": "1"}, ["--standalone", "--nproc-per-node", "1"]),
        (
            8,
            {"NODES": "2", "NODE": "1", "MASTER": "host0"},
            [
                *("--nnodes", "2", "--node-rank", "1", "--master-addr", "host0", "--master-port", "29500"),
                *("--nproc-per-node", "8"),
            ],
        ),
    ],
)
def test_torchrun_starts(programs: Programs, gpus: int, variables: dict[str, str], where: list[str]) -> None:
    programs.add("python")
    if gpus:
        programs.add("nvidia-smi", "GPU 0: x\n" * gpus)
    assert run(TORCHRUN, *WORDS, **variables).returncode == 0
    rest = ["--max-restarts", "0", "-m", "seer", "train", *WORDS]
    assert programs.calls("python") == [["-m", "torch.distributed.run", *where, *rest]]


@pytest.mark.parametrize(("missing", "given"), [("NODE", {"MASTER": "h"}), ("MASTER", {"NODE": "0"})])
def test_torchrun_on_several_machines_asks_for_what_is_missing(
    programs: Programs, missing: str, given: dict[str, str]
) -> None:
    programs.add("python")
    done = run(TORCHRUN, *WORDS, NODES="2", **given)
    assert done.returncode != 0 and f"{missing}: " in done.stderr and programs.calls("python") == []


def test_torchrun_really_starts_two_ranks(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (programs.folder / "python").symlink_to(sys.executable)
    stand_in = tmp_path / "code" / "seer"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    (stand_in / "__main__.py").write_text(
        "import os, sys\nopen(os.environ['RANK'], 'w').write(' '.join([os.environ['WORLD_SIZE'], *sys.argv[1:]]))\n"
    )
    site = next(path for path in sys.path if path.endswith("site-packages"))
    done = run(TORCHRUN, *WORDS, PYTHONPATH=f"{stand_in.parent}{os.pathsep}{site}", PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr
    assert [Path(rank).read_text() for rank in "01"] == [f"2 train {' '.join(WORDS)}"] * 2
    assert "OMP_NUM_THREADS" not in done.stderr


@pytest.mark.parametrize("cpus", [None, "12"])
def test_slurm_starts_one_task_a_rank(programs: Programs, tmp_path: Path, cpus: str | None) -> None:
    seen = tmp_path / "seen"
    programs.add("srun", first=f'echo "$SEER_LAUNCHER-$RANK-" >{seen}', code=75)
    variables = {"SLURM_JOB_ID": "17", "RANK": "3"} | ({"SLURM_CPUS_PER_TASK": cpus} if cpus else {})
    assert run(SLURM, *WORDS, **variables).returncode == 75
    (call,) = programs.calls("srun")
    assert call == [
        *("--kill-on-bad-exit=1", "--export=ALL", *([f"--cpus-per-task={cpus}"] if cpus else [])),
        *("--output=seer-17-%t.log", "--open-mode=append", "seer", "train", *WORDS),
    ]
    assert seen.read_text() == "slurm--\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT])
def test_slurm_waits_for_its_tasks_whatever_the_batch_script_is_sent(
    programs: Programs, tmp_path: Path, number: signal.Signals
) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    programs.add("srun", first=f"trap '' TERM; : >{started}; until [ -e {go} ]; do sleep 0.02; done", code=75)
    process = subprocess.Popen([SLURM, *WORDS], env=os.environ | {"SLURM_JOB_ID": "17"})
    try:
        while not started.exists():
            time.sleep(0.01)
        for _ in range(2):
            process.send_signal(number)
            time.sleep(0.1)
        assert process.poll() is None
    finally:
        go.touch()
    assert process.wait(timeout=20) == 75


@pytest.mark.parametrize("script", [TORCHRUN, SLURM])
def test_without_words_a_script_says_how_it_is_used(programs: Programs, script: Path) -> None:
    programs.add("python")
    programs.add("srun")
    done = run(script)
    assert f"launch/{script.name}" in done.stdout and "KEY=VALUE" in done.stdout
    assert programs.calls("python") == programs.calls("srun") == []


@pytest.mark.parametrize("script", [TORCHRUN, SLURM])
def test_a_script_is_short(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert len(lines) < 60 and max(map(len, lines)) <= 120
