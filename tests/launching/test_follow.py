"""Runs seen from outside: each state is told from files that the product itself wrote."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from recorded_run import recorded_run
from slurm_stubs import Programs, configured

from seer.errors import LostRank, UserError
from seer.launching.folder import LaunchFolder
from seer.launching.follow import RunView, runs_below
from seer.observe.metrics import MetricsFile
from seer.run_directory import lock_of, metrics_of

CONFIG = {"seed": 0, "train": {"steps": 100}}
LINE = {"loss": 3.0, "chance": 5.5, "images_per_s": 20.0}


def made(folder: Path, *steps: int, result: dict[str, Any] | None = None, **figures: Any) -> Path:
    """A run that logged these steps, of 8 images each, and gave its lock back."""
    with recorded_run(folder, CONFIG) as run:
        file = MetricsFile(run.metrics)
        for step in steps:
            file.write({"step": step, "images_seen": 8 * step, **LINE, **figures})
        if result is not None:
            run.write_result(result)
    return folder


def only(folder: Path) -> RunView:
    (one,) = runs_below(folder)
    return one


def held_by_a_dead_process(folder: Path) -> Path:
    code = "import sys; from pathlib import Path; from seer.run_lock import RunLock; RunLock.take(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, lock_of(folder)], check=True, timeout=60)
    assert lock_of(folder).exists()
    return folder


def test_finished(tmp_path: Path) -> None:
    made(tmp_path / "a", 50, 100, result={"state": "finished", "steps": 100, "knn_top1": 0.75})
    one = only(tmp_path)
    assert (one.folder, one.state, one.step, one.total_steps) == (tmp_path / "a", "finished", 100, 100)
    assert (one.images_per_s, one.loss, one.chance, one.knn_top1) == (20.0, 3.0, 5.5, 0.75)
    assert one.host is None and one.seconds_left is None
    assert one.line_age_seconds is not None and 0 <= one.line_age_seconds < 60


def test_running_is_held_by_a_living_process_whatever_an_earlier_life_left(tmp_path: Path) -> None:
    made(tmp_path / "a", 10, result={"state": "stopped", "steps": 10})
    with recorded_run(tmp_path / "a", CONFIG):
        one = only(tmp_path)
    assert one.state == "running" and one.host == socket.gethostname() and not one.is_elsewhere
    assert one.seconds_left == 90 * 8 / 20.0


def test_running_elsewhere_names_the_host(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", 10)
    with recorded_run(folder, CONFIG):
        content = json.loads(lock_of(folder).read_bytes())
        lock_of(folder).write_text(json.dumps(content | {"host": "n17"}))
        one = only(tmp_path)
    assert (one.state, one.host, one.is_elsewhere) == ("running", "n17", True)


def test_stopped(tmp_path: Path) -> None:
    made(tmp_path / "a", 10, result={"state": "stopped", "steps": 10})
    assert only(tmp_path).state == "stopped"


@pytest.mark.parametrize("result", [None, {"state": "stopped", "steps": 10}])
def test_lost_left_the_lock_of_a_dead_process(tmp_path: Path, result: dict[str, Any] | None) -> None:
    held_by_a_dead_process(made(tmp_path / "a", 10, result=result))
    assert only(tmp_path).state == "lost"


def test_lost_without_lock_or_result(tmp_path: Path) -> None:
    made(tmp_path / "a", 10)
    one = only(tmp_path)
    assert one.state == "lost" and one.seconds_left is None


def launched(folder: Path, exit_code: int | None = None) -> Path:
    launch = LaunchFolder(folder)
    launch.folder.mkdir(parents=True)
    launch.config.write_text("run_dir: x\n")
    if exit_code is not None:
        launch.status.write_text(json.dumps({"exit_code": exit_code, "message": None}))
    return folder


def test_queued_until_something_is_written(tmp_path: Path) -> None:
    launched(tmp_path / "a")
    one = only(tmp_path)
    assert one.state == "queued" and one.step is None and one.loss is None
    metrics_of(tmp_path / "a").touch()
    assert only(tmp_path).state == "lost"


def test_failed_said_so(tmp_path: Path) -> None:
    launched(tmp_path / "a", exit_code=2)
    assert only(tmp_path).state == "failed"
    launched(tmp_path / "b" / "c", exit_code=75)
    assert [one.state for one in runs_below(tmp_path / "b")] == ["queued"]


@pytest.fixture
def programs(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Programs:
    return Programs(tmp_path_factory.mktemp("programs") / "bin", monkeypatch)


def submitted(folder: Path, *jobs: int, exit_code: int | None = None) -> Path:
    launched(folder, exit_code)
    for job in jobs:
        (LaunchFolder(folder).folder / f"{job}_submission.sh").touch()
    return folder


@pytest.mark.parametrize("waits", ["PENDING|Resources", "REQUEUED|None", "CONFIGURING|None", "PENDING|a|b"])
def test_queued_while_the_newest_job_waits(tmp_path: Path, programs: Programs, waits: str) -> None:
    """Whatever its earlier lives left, and with one question for all runs."""
    programs.add("squeue", f"9|{waits}\n100|{waits}\n")
    submitted(made(tmp_path / "again", 10, result={"state": "stopped", "steps": 14}), 9, 100)
    submitted(tmp_path / "new", 100)
    submitted(held_by_a_dead_process(made(tmp_path / "died", 10)), 100)
    submitted(made(tmp_path / "failed", 10), 100, exit_code=1)
    submitted(made(tmp_path / "finished", 100, result={"state": "finished", "steps": 100}), 100)
    submitted(made(tmp_path / "older", 10, result={"state": "stopped", "steps": 14}), 9, 101)
    elsewhere = submitted(made(tmp_path / "elsewhere", 10), 100)
    with recorded_run(elsewhere, CONFIG):
        content = json.loads(lock_of(elsewhere).read_bytes())
        lock_of(elsewhere).write_text(json.dumps(content | {"host": "n17"}))
        with recorded_run(submitted(tmp_path / "here", 100), CONFIG):
            found = {one.folder.name: one for one in runs_below(tmp_path)}
    queued = dict.fromkeys(("again", "new", "died", "failed", "elsewhere"), "queued")
    rest = {"finished": "finished", "older": "stopped", "here": "running"}
    assert {name: one.state for name, one in found.items()} == queued | rest
    assert found["elsewhere"].host is None and found["again"].step == 14
    assert programs.calls("squeue") == [["-h", "--me", "-o", "%i|%T|%r"]]


def test_lost_when_its_job_left_the_queue_before_it_wrote_anything(tmp_path: Path, programs: Programs) -> None:
    submitted(tmp_path / "a", 17)
    launched(tmp_path / "by hand")

    def states() -> list[str]:
        return [one.state for one in sorted(runs_below(tmp_path), key=lambda one: one.folder)]

    assert states() == ["queued", "queued"], "nobody can be asked"
    programs.add("squeue", "17|RUNNING|None\n")
    assert states() == ["queued", "queued"], "it imports"
    programs.add("squeue", complains="slurm_load_jobs error: Unable to contact slurm controller", code=1)
    assert states() == ["queued", "queued"]
    for over in ("", "9|PENDING|None\n", "17|CANCELLED|None\n"):
        programs.add("squeue", over)
        assert states() == ["lost", "queued"]
    with LaunchFolder(tmp_path / "a").frozen(configured()):
        assert states() == ["queued", "queued"], "it is launched again at the moment"


def test_slurm_is_not_waited_for(tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seer.launching.follow._PATIENCE_SECONDS", 0.01)
    programs.add("squeue", first="while :; do :; done")
    submitted(tmp_path / "a", 17)
    assert only(tmp_path).state == "queued"


def test_without_jobs_nobody_is_asked(tmp_path: Path, programs: Programs) -> None:
    programs.add("squeue")
    launched(tmp_path / "a")
    assert only(tmp_path).state == "queued" and programs.calls("squeue") == []


def test_jobs_of_others_are_unknown(tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    """squeue --me does not show them, which says nothing of them."""
    programs.add("squeue")
    submitted(tmp_path / "a", 17)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert only(tmp_path).state == "queued"


def test_the_step_that_was_saved_may_not_have_been_logged(tmp_path: Path) -> None:
    made(tmp_path / "a", 10, result={"state": "stopped", "steps": 14})
    assert only(tmp_path).step == 14
    made(tmp_path / "a", 20)  # another life, which did not tell how it ended
    assert only(tmp_path).step == 20


def test_scores_of_an_earlier_line_stay(tmp_path: Path) -> None:
    with recorded_run(tmp_path, CONFIG) as run:
        file = MetricsFile(run.metrics)
        file.write({"step": 1, "images_seen": 8, **LINE, "knn_top1": 0.5})
        file.write({"step": 2, "images_seen": 16, **LINE, "loss": None})
    one = only(tmp_path)
    assert (one.step, one.knn_top1, one.loss, one.chance) == (2, 0.5, None, 5.5)


def test_only_the_end_of_a_large_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "a", 1)
    made(folder, 2, knn_top1=0.5)
    made(folder, *range(3, 40))
    assert only(tmp_path).knn_top1 == 0.5
    monkeypatch.setattr("seer.launching.follow._TAIL_BYTES", 200)
    one = only(tmp_path)
    assert (one.step, one.knn_top1) == (39, None)


def test_a_line_in_the_making_is_not_read(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", 39)
    with metrics_of(folder).open("ab") as stream:
        stream.write(b'{"step": 4')
    assert only(tmp_path).step == 39
    with metrics_of(folder).open("ab") as stream:
        stream.write(b'0, "loss": 1.0}')  # whole, but the next bytes of the same line may follow
    assert only(tmp_path).step == 39


def test_two_levels_deep_and_not_inside_of_runs(tmp_path: Path) -> None:
    for place in ("a", "group/b", "group/more/too_deep", "a/checkpoints/inside", ".hidden"):
        made(tmp_path / place, 1)
    assert {str(one.folder.relative_to(tmp_path)) for one in runs_below(tmp_path)} == {"a", "group/b"}
    assert [one.folder for one in runs_below(tmp_path / "a")] == [tmp_path / "a"]


def test_last_activity_comes_first(tmp_path: Path) -> None:
    for name, age in (("old", 300), ("new", 100), ("middle", 200)):
        folder = made(tmp_path / name, 1)
        for path in (metrics_of(folder), folder):
            os.utime(path, (1e9 - age, 1e9 - age))
    assert [one.folder.name for one in runs_below(tmp_path)] == ["new", "middle", "old"]


def test_foreign_and_broken_folders_are_left_out_or_shown_as_far_as_they_go(tmp_path: Path) -> None:
    made(tmp_path / "good", 1)
    (tmp_path / "foreign" / "launch").mkdir(parents=True)
    (tmp_path / "foreign" / "config.yaml").write_text("a: [1\n")
    (tmp_path / "foreign" / "metrics.jsonl").write_text("[]\n")
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    broken = made(tmp_path / "broken", 1)
    metrics_of(broken).write_bytes(b'\x00\xff\n{"step": "x", "loss": {}, "images_per_s": []}\n7\n')
    (broken / "result.json").write_text("{")
    lock_of(broken).write_text("?")
    found = {one.folder.name: one for one in runs_below(tmp_path)}
    assert found.keys() == {"good", "broken"}
    assert (found["broken"].state, found["broken"].step, found["broken"].loss) == ("lost", None, None)


def test_a_misspelt_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    with pytest.raises(UserError, match="did you mean 'experiments'"):
        runs_below(tmp_path / "experimnets")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        runs_below(tmp_path / "file")
    with pytest.raises(UserError, match="does not exist"):
        runs_below(tmp_path / "a" / "b")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("all is bad", "it should be good", "mend it"), "all is bad: it should be good; mend it"),
        (ValueError("a bug\nof two lines"), "ValueError: a bug of two lines"),
    ],
)
def test_failed_names_the_error_that_ended_a_run_by_hand(tmp_path: Path, error: Exception, line: str) -> None:
    with pytest.raises(type(error)), recorded_run(made(tmp_path / "a", 10), CONFIG):
        raise error
    assert (only(tmp_path).state, only(tmp_path).error) == ("failed", line)
    with recorded_run(tmp_path / "a", CONFIG):
        assert (only(tmp_path).state, only(tmp_path).error) == ("running", None)
    assert only(tmp_path).state == "lost", "what an earlier life left says nothing of this one"


def test_who_was_stopped_or_lost_the_run_to_another_leaves_no_error(tmp_path: Path) -> None:
    for end in (SystemExit(75), LostRank("another process is gone")):
        with pytest.raises(type(end)), recorded_run(made(tmp_path / "a", 10), CONFIG):
            raise end
        assert only(tmp_path).state == "lost"
    with pytest.raises(UserError), recorded_run(tmp_path / "a", CONFIG) as run:
        lock_of(tmp_path / "a").write_text("{}")
        run.require_ownership()
    assert not run.result.exists()


def test_failing_before_the_first_step_binds_nobody(tmp_path: Path) -> None:
    with pytest.raises(UserError), recorded_run(tmp_path / "a", {"seed": 0}):
        raise UserError("a", "b", "c")
    assert only(tmp_path).state == "failed"
    recorded_run(tmp_path / "a", {"seed": 1}).close()


def test_a_full_disk_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="the first"), recorded_run(made(tmp_path / "a", 10), CONFIG):
        monkeypatch.setattr("seer.run_directory.write_atomically", full)
        raise UserError("the first", "b", "c")
    assert only(tmp_path).state == "lost" and not lock_of(tmp_path / "a").exists()


def test_failed_of_a_launch_names_what_it_said(tmp_path: Path) -> None:
    launched(tmp_path / "a")
    LaunchFolder(tmp_path / "a").status.write_text(json.dumps({"exit_code": 2, "message": "no such shards"}))
    assert only(tmp_path).error == "no such shards"
