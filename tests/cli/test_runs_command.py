"""`seer runs` as a user meets it: a table, or a JSON list."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from recorded_run import recorded_run

from seer.cli.main import main
from seer.errors import UserError
from seer.observe.metrics import MetricsFile
from seer.run_directory import lock_of


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """One run that is running on another machine, one that was stopped."""
    for name, score in (("here", {}), ("group/there [red]", {"knn_top1": 0.756})):
        with recorded_run(tmp_path / name, {"train": {"steps": 1200}}) as run:
            line = {"step": 600, "images_seen": 4800, "loss": 3.456, "chance": 5.545, "images_per_s": 8.0}
            MetricsFile(run.metrics).write(line | score)
            if name == "here":
                run.write_result({"state": "stopped", "steps": 600})
            held = json.loads(lock_of(run.folder).read_bytes())
    lock_of(tmp_path / "group/there [red]").write_text(json.dumps(held | {"host": "n17"}))
    return tmp_path


def test_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(runs)]) == 0
    header, there, here = (re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines())
    assert header == ["run", "state", "step", "images/s", "loss (chance)", "kNN", "time left", "last line"]
    assert there[:7] == [
        *("group/there [red]", "running on n17", "600/1,200", "8.0", "3.46 (5.54)", "75.6%", "10 min 00 s"),
    ]
    assert here[:7] == ["here", "stopped", "600/1,200", "8.0", "3.46 (5.54)", "-", "-"]
    assert here[7].endswith(" ago")


def test_the_error_of_a_run_that_failed_is_the_last_column(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    with pytest.raises(UserError), recorded_run(runs / "here", {"train": {"steps": 1200}}):
        raise UserError("all images are bad", "they should be [good]", "mend them")
    assert main(["runs", str(runs)]) == 0
    header, here, _ = (re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines())
    assert header[-1] == "error" and here[1] == "failed"
    assert here[-1] == "all images are bad: they should be [good]; mend them"


def test_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["state"], one["host"], one["step"], one["total_steps"]) for one in found] == [
        ("running", "n17", 600, 1200),
        ("stopped", None, 600, 1200),
    ]
    assert found[0]["folder"] == str(runs / "group/there [red]") and found[0]["seconds_left"] == 600.0


def test_a_single_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(runs / "here")]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("here ")


def test_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("no runs in ")
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize(
    ("words", "message"), [(["rums"], "did you mean 'runs'"), ([], "DIR"), (["runs", "--jsn"], "did you mean '--json'")]
)
def test_what_is_wrong_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["runs", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
