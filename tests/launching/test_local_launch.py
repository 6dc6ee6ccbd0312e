"""Processes on this machine: how many, by which command, and that they can be followed and stopped."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
from slurm_stubs import Programs, configured

from seer.errors import UserError
from seer.launching import local
from seer.launching.folder import LaunchFolder
from seer.launching.placement import Placement
from seer.launching.tail import Tail

# Plays `seer train --frozen`: tells what it got, and waits for a signal where the configuration says so.
STAND_IN = """\
import json, os, signal, sys, time
rank = os.environ.get("RANK", "0")
print("rank", rank, "of", os.environ.get("WORLD_SIZE"), "at", os.environ.get("MASTER_ADDR"), *sys.argv[1:], flush=True)
print("SLURM_PROCID" in os.environ, os.environ["OMP_NUM_THREADS"], file=sys.stderr, flush=True)
def end(code):
    if rank == "0":
        with open(os.environ["SEER_STATUS_FILE"], "w") as file:
            json.dump({"exit_code": code, "message": None}, file)
    sys.exit(code)
if "wait" in open(sys.argv[3]).read():
    signal.signal(signal.SIGTERM, lambda *_: end(75))
    print("ready", flush=True)
    time.sleep(30)
end(0)
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    return Programs(tmp_path / "bin", monkeypatch)


def gpus(programs: Programs, count: int) -> None:
    lines = "".join(f"GPU {number}: NVIDIA H100 (UUID: GPU-{number})\n  MIG 1g\n" for number in range(count))
    programs.add("nvidia-smi", lines)


def stand_in(tmp_path: Path, text: str) -> LaunchFolder:
    """A launch folder whose frozen code is the stand-in."""
    folder = LaunchFolder(tmp_path / "r")
    (folder.code / "seer").mkdir(parents=True)
    (folder.code / "seer" / "__init__.py").touch()
    (folder.code / "seer" / "__main__.py").write_text(STAND_IN)
    folder.config.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 4), ("0,1", 2), ("3", 1), ("", 0), ("-1", 0), ("0,9,1", 1), ("GPU-1,GPU-2", 2), ("0,1,2,3,4,5", 4)],
)
def test_gpus_that_a_process_would_see(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int
) -> None:
    gpus(programs, 4)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local.gpu_count() == count


def test_no_driver_or_a_broken_one_is_no_gpu(programs: Programs) -> None:
    assert local.gpu_count() == 0
    programs.add("nvidia-smi", "NVIDIA-SMI has failed\n", code=9)
    assert local.gpu_count() == 0


@pytest.mark.parametrize(
    ("there", "words", "placement"),
    [
        (4, [], Placement(1, 4, gpus=True)),
        (4, ["launch.gpus_per_node=3"], Placement(1, 3, gpus=True)),
        (4, ["parallel.strategy=single"], Placement(1, 1, gpus=True)),
        (4, ["train.device=cpu"], Placement(1, 2, gpus=False)),
        (0, [], Placement(1, 2, gpus=False)),
        (0, ["launch.gpus_per_node=1"], Placement(1, 1, gpus=False)),
        (0, ["launch.gpus_per_node=6"], Placement(1, 6, gpus=False)),
    ],
)
def test_processes(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, there: int, words: list[str], placement: Placement
) -> None:
    gpus(programs, there)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert local.place(configured(*words)) == placement


@pytest.mark.parametrize(
    ("there", "words", "message"),
    [
        (
            4,
            ["launch.gpus_per_node=5"],
            "gpus_per_node=5: this machine has 4 GPUs .*; use launch.gpus_per_node=4 or less",
        ),
        (0, ["launch.gpus_per_node=7"], "gpus_per_node=7 without GPUs: .* there are 6"),
        (0, ["train.device=cuda"], "train.device=cuda: this machine shows no GPU"),
        (4, ["launch.nodes=2"], "launch.nodes=2 with launch=local: .* launch=slurm, or give launch/torchrun.sh"),
    ],
)
def test_what_this_machine_cannot_do(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, there: int, words: list[str], message: str
) -> None:
    gpus(programs, there)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    with pytest.raises(UserError, match=message):
        local.place(configured(*words))


def test_one_process_is_the_plain_command(tmp_path: Path) -> None:
    folder = LaunchFolder(tmp_path)
    expected = [sys.executable, "-m", "seer", "train", "--frozen", str(folder.config)]
    assert local.command(folder, Placement(1, 1, gpus=True)) == expected


def test_variables_keep_what_the_user_set(programs: Programs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = local.variables(configured("launch.network_interface=eth1"), LaunchFolder(tmp_path))
    assert found["PYTHONPATH"] == f"{tmp_path}/launch/code:/mine" and found["OMP_NUM_THREADS"] == "3"
    assert found["GLOO_SOCKET_IFNAME"] == found["NCCL_SOCKET_IFNAME"] == "eth1"
    assert found["SEER_STATUS_FILE"] == f"{tmp_path}/launch/status.json"


def test_one_process_is_followed_to_its_exit_code(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("SLURM_PROCID", "7")
    folder = stand_in(tmp_path, "")
    folder.rank_log(0).write_text("an older life\n")
    one = Placement(1, 1, gpus=False)
    tail = Tail(folder.rank_log(0))
    assert local.follow(local.start(configured(), folder, one), folder, one, tail) == 0
    assert capsys.readouterr().out == f"rank 0 of None at None train --frozen {folder.config}\nFalse 1\n"
    assert folder.rank_log(0).read_text().startswith("an older life\nrank 0")


def test_a_run_that_dies_without_a_word_is_exit_code_1(
    programs: Programs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stand_in(tmp_path, "")
    (folder.code / "seer" / "__main__.py").write_text("import os; os.kill(os.getpid(), 9)")
    one = Placement(1, 1, gpus=False)
    assert local.follow(local.start(configured(), folder, one), folder, one, Tail(folder.rank_log(0))) == 1
    assert str(folder.rank_log(0)) in capsys.readouterr().err


def test_ranks_under_torchrun_are_stopped_by_ctrl_c_and_leave_their_exit_code(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stand_in(tmp_path, "wait")
    two = Placement(1, 2, gpus=False)
    tail = Tail(folder.rank_log(0))
    sleep = time.sleep

    def interrupt_when_ready(seconds: float) -> None:
        sleep(seconds)
        logs = [folder.rank_log(rank) for rank in (0, 1)]
        if all(log.exists() and "ready" in log.read_text() for log in logs):
            monkeypatch.setattr(time, "sleep", sleep)
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt_when_ready)
    pid = local.start(configured(), folder, two)
    assert os.getsid(pid) == pid, "a closed terminal would end the run"
    assert local.follow(pid, folder, two, tail) == 75
    out, error = capsys.readouterr()
    assert out == f"rank 0 of 2 at 127.0.0.1 train --frozen {folder.config}\nFalse 1\nready\n"
    assert "SIGTERM to 2 processes" in error
    assert folder.rank_log(1).read_text().startswith("rank 1 of 2")
    assert "OMP_NUM_THREADS" not in folder.agent_log.read_text()
    assert json.loads(folder.status.read_text())["exit_code"] == 75


def test_tail_shows_what_is_new_and_waits_for_the_rest_of_a_letter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "log"
    tail = Tail(file)
    tail.copy()
    letter = "ü".encode()
    file.write_bytes(b"a" + letter[:1])
    tail.copy()
    file.write_bytes(b"a" + letter + b"b")
    tail.copy()
    tail.copy()
    assert capsys.readouterr().out == "aüb"
