"""What a launch freezes: configuration with paths that mean the same elsewhere, code that edits do not reach."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from seer.compose import compose, thaw
from seer.config import TrainConfig, freeze
from seer.errors import UserError
from seer.launching import folder as folders
from seer.launching.entry import read_frozen
from seer.launching.folder import LaunchFolder, absolute, without_rank_variables


def config(run_dir: Path | str, *words: str) -> TrainConfig:
    return absolute(compose([f"run_dir={run_dir}", "data.shards=s-{000..127}.tar", *words]))


def test_paths_and_patterns_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    found = config(
        "runs/../r",
        "data.index_dir=index",
        "data.mixture=[web 0.8 w/*.tar,own 0.2 ~/o.tar]",
        "evaluation.train=[a/**/*.tar,/b/[0-9].tar]",
        "evaluation.val=['~/v.tar','s3://bucket/v.tar']",
        "train.init_from=w.safetensors",
    )
    assert found.run_dir == str(tmp_path / "r")
    assert found.data.shards == [f"{tmp_path}/s-{{000..127}}.tar"]
    assert found.data.index_dir == f"{tmp_path}/index"
    assert found.data.mixture == [f"web 0.8 {tmp_path}/w/*.tar", "own 0.2 /home/somebody/o.tar"]
    assert found.evaluation.train == [f"{tmp_path}/a/**/*.tar", "/b/[0-9].tar"]
    assert found.evaluation.val == ["/home/somebody/v.tar", "s3://bucket/v.tar"]
    assert found.train.init_from == f"{tmp_path}/w.safetensors"


def test_what_is_not_given_stays_so(tmp_path: Path) -> None:
    found = config(tmp_path / "r")
    assert found.data.index_dir is None and found.train.init_from is None and found.evaluation.train == []


def test_what_is_frozen_is_what_ranks_read(tmp_path: Path) -> None:
    given = config(tmp_path / "r", "launch.extra_sbatch=[a=1,b]")
    folder = LaunchFolder(tmp_path / "r")
    with folder.frozen(given):
        pass
    assert folder.config == tmp_path / "r" / "launch" / "config.yaml"
    assert thaw(read_frozen(str(folder.config))) == given


def test_the_frozen_code_is_what_runs_even_from_a_folder_with_another_package(tmp_path: Path) -> None:
    folder = LaunchFolder(tmp_path / "r")
    with folder.frozen(config(tmp_path / "r")):
        pass
    (tmp_path / "seer").mkdir()
    (tmp_path / "seer" / "__init__.py").write_text("raise SystemExit('the edited code')")
    told = subprocess.run(
        [sys.executable, "-c", "import seer, seer.compose as c; print(seer.__file__); print(c.conf_folder())"],
        env=os.environ | {"PYTHONPATH": str(folder.code), "PYTHONSAFEPATH": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == [f"{folder.code}/seer/__init__.py", f"{folder.code}/seer/conf"]
    assert (folder.code / "seer" / "conf" / "experiment" / "small.yaml").is_file()


def test_a_second_launch_replaces_what_the_first_left(tmp_path: Path) -> None:
    folder = LaunchFolder(tmp_path / "r")
    with folder.frozen(config(tmp_path / "r")):
        pass
    folder.status.write_text('{"exit_code": 75, "message": null}')
    folder.rank_pid(0).write_text("1")
    (folder.code / "seer" / "removed.py").touch()
    assert folder.exit_code() == 75
    with folder.frozen(config(tmp_path / "r", "train.steps=7")):
        pass
    assert folder.exit_code() is None and not folder.rank_pid(0).exists()
    assert not (folder.code / "seer" / "removed.py").exists()
    assert thaw(read_frozen(str(folder.config))).train.steps == 7


@pytest.mark.parametrize("before", [(), ("deep/r/",), ("deep/other",), ("deep/r/launch",)])
def test_a_start_that_fails_leaves_nothing_that_was_not_there(tmp_path: Path, before: tuple[str, ...]) -> None:
    for name in before:
        (tmp_path / name).mkdir(parents=True)
    there = sorted(tmp_path.rglob("*"))
    folder = LaunchFolder(tmp_path / "deep" / "r")
    with pytest.raises(UserError), folder.frozen(config(tmp_path / "deep" / "r")):
        assert folder.config.is_file()
        raise UserError("a", "b", "c")
    if folder.folder not in there:
        assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.parametrize("text", ["", "{", "[]", '{"exit_code": null}', '{"message": "x"}'])
def test_a_status_that_says_nothing(tmp_path: Path, text: str) -> None:
    folder = LaunchFolder(tmp_path)
    folder.folder.mkdir()
    folder.status.write_text(text)
    assert folder.exit_code() is None


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "write_atomically", full)
    with pytest.raises(UserError, match="No space left"), LaunchFolder(tmp_path / "r").frozen(config(tmp_path / "r")):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_environment_of_a_run_forgets_other_launchers() -> None:
    stale = {"RANK": "3", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x", "SLURM_PROCID": "1", "SLURM_JOB_ID": "9"}
    stale |= {"TORCHELASTIC_RUN_ID": "r", "PET_NNODES": "2", "SEER_STATUS_FILE": "f", "SEER_LAUNCHER": "slurm"}
    kept = {"HOME": "/h", "SLURM_CONF": "/etc/slurm.conf", "CUDA_VISIBLE_DEVICES": "1", "RANKS": "2"}
    assert without_rank_variables(stale | kept) == kept


def test_the_configuration_itself_is_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = compose(["run_dir=r", "data.shards=s.tar"])
    before = freeze(given)
    absolute(given)
    assert freeze(given) == before


@pytest.mark.parametrize(
    ("status", "logged", "told"),
    [
        ('{"exit_code": 2, "message": "a shard is gone"}', "step 1", "seer: a shard is gone\n"),
        ('{"exit_code": 2, "message": "a shard is gone"}', "seer: a shard is gone", ""),  # rank 0 said it itself
        ('{"exit_code": 0, "message": null}', "step 1", ""),
        (None, "step 1", ""),
        ("{", "step 1", ""),
    ],
)
def test_what_another_process_than_rank_0_met_is_told(
    tmp_path: Path, status: str | None, logged: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = LaunchFolder(tmp_path)
    folder.folder.mkdir()
    folder.rank_log(0).write_text(logged)
    if status is not None:
        folder.status.write_text(status)
    folder.tell_cause(folder.rank_log(0))
    assert capsys.readouterr().err == told
