"""`seer launch` as a user meets it: what is wrong is told before anything is written, what starts can be followed."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from recorded_run import recorded_run
from slurm_stubs import Programs
from tiny_run import make_shards

from seer.cli.main import main
from seer.compose import compose, thaw
from seer.config import freeze
from seer.data.history import History
from seer.shard_list import ShardList

TINY = (
    *("experiment=demo", "data.workers=0", "data.large.size=32", "data.small.size=24", "data.small.count=2"),
    *("objective.prototypes=8", "objective.freeze_prototypes_steps=1", "train.steps=1", "train.global_batch_size=8"),
    *("train.threads=1", "train.log_every_steps=1", "train.precision=fp32", "evaluation.every_steps=0"),
    *("evaluation.train=[]", "evaluation.val=[]"),
)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """In a folder where nothing else is."""
    programs = Programs(tmp_path / "bin", monkeypatch)
    programs.cluster()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return programs


def launch(shards: str, *words: str) -> int:
    given = {word.partition("=")[0] for word in words}
    return main(
        ["launch", f"data.shards={shards}", *(key for key in TINY if key.partition("=")[0] not in given), *words]
    )


def there() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run_dir=r", "--wiat"], "seer launch --wiat: there is no such option; did you mean '--wait'?"),
        (["run_dir=r", "launch=slrum"], "did you mean 'slurm'?"),
        (["run_dir=r", "launch.gpus_per_node=0"], "launch.gpus_per_node=0"),
        (["run_dir=r", "launch.nodes=0"], "launch.nodes=0"),
        (["run_dir=r", "launch.nodes=0", "launch=slurm"], "launch.nodes=0: at least 1"),
        (["run_dir=r", "launch.nodes=2"], "use launch=slurm, or give launch/torchrun.sh on each machine"),
        (["run_dir=r", "train.global_batch_size=9"], "does not divide by 2 processes"),
        (
            ["run_dir=r", "parallel.strategy=single", "launch.gpus_per_node=2"],
            "parallel.strategy=single under 2 processes",
        ),
        (["run_dir=r", "parallel.strategy=fsdp", "parallel.shard_ranks=3"], "parallel.shard_ranks=3 under 2 processes"),
        (["run_dir=r", "train.global_batch_size=100"], "48 samples in 3 shards: one batch needs 100"),
        (["run_dir=r", "train.init_from=w.safetensors"], "w.safetensors: there is no such file"),
        (
            ["run_dir=r", "evaluation.every_steps=1", "evaluation.train=t.tar", "evaluation.val=v.tar"],
            "no shard matches",
        ),
        (["run_dir=/proc/r"], "/proc/r cannot be written"),
        (["run_dir=r", "launch=slurm", "launch.partition=gup"], "launch.partition=gup: there is no such partition"),
        (["run_dir=r", "launch=slurm", "launch.gpus_per_node=9"], "the largest node of partition gpu has 8 GPUs"),
        (
            ["run_dir=r", "launch=slurm", "launch.nodes=3", "train.global_batch_size=8"],
            "does not divide by 12 processes",
        ),
        (
            ["run_dir=r", "launch=slurm", "launch.gpus_per_node=8", "launch.cpus_per_gpu=99"],
            "launch.cpus_per_gpu=99 with 1 node x 8 GPUs: the largest node of partition gpu that would do has 64 cores",
        ),
        (["run_dir=s3://photos/runs"], "run_dir=s3://photos/runs is an address"),
        (["run_dir=a%j", "launch=slurm"], "SLURM reads % in a path as a pattern"),
        (["run_dir=r", "launch=slurm", "launch.time_limit_minutes=2"], "launch.stop_before_end_seconds=120 with"),
        (["run_dir=r", "launch=slurm", "launch.extra_sbatch=--exclusive"], "without dashes in front"),
        (["run_dir=r", "launch=slurm", "launch.extra_sbatch=[ntasks_per_node=3]"], "use launch.gpus_per_node"),
        (["run_dir=r", "launch=slurm", "launch.account="], "launch.account is empty"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_written_or_queued(
    words: list[str],
    message: str,
    shards: str,
    programs: Programs,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert launch(shards, *words) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("seer: ") and error.count("\n") == 1 and message in error
    assert there() == [] and programs.calls("sbatch") == []


def test_shards_that_are_not_there_or_have_no_index(
    programs: Programs, shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("nowhere/*.tar", "run_dir=r") == 2
    assert "no shard matches" in capsys.readouterr().err
    Path("s.tar").write_bytes(b"\0" * 1024)
    assert launch("s.tar", "run_dir=r") == 2
    assert "has no index" in capsys.readouterr().err
    assert there() == ["s.tar"]


def test_a_folder_of_something_else_is_refused(
    programs: Programs, shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("r").mkdir()
    Path("r/photo.jpg").touch()
    assert launch(shards, "run_dir=r", "launch=slurm") == 2
    assert "is no run and is not empty" in capsys.readouterr().err
    assert programs.calls("sbatch") == []


def test_shards_that_came_later_are_let_through_where_they_may_join(
    programs: Programs, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = make_shards(tmp_path / "more", classes=1, seed=1)
    config = freeze(compose([*TINY, f"data.shards={shards}", f"run_dir={tmp_path / 'run'}"]))
    began_with = History.beginning(ShardList.open(shards), [])
    with recorded_run(tmp_path / "run", config, shards=began_with.to_json()) as run:
        run.metrics.touch()
    words = (f"run_dir={tmp_path / 'run'}", "--dry-run")
    assert launch(f"[{shards},{more}]", *words) == 2
    assert re.fullmatch(
        "seer: data.shards names .*which the run does not know: .*allow_growth.*\n", capsys.readouterr().err
    )
    assert launch(f"[{shards},{more}]", "data.allow_growth=true", *words) == 0
    assert launch(more, "data.allow_growth=true", *words) == 2
    assert "seer: shards-000000.tar changed (" in capsys.readouterr().err
    run.write_result({"state": "finished", "steps": 1})
    assert launch(shards, *words) == 0
    assert "is finished" in capsys.readouterr().out
    assert launch(more, *words) == 2, "nothing would be started, and yet these are not its images"
    assert "holds a run of another configuration (data.shards" in capsys.readouterr().err


def test_dry_run_prints_the_command_and_writes_nothing(
    programs: Programs, shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(shards, "run_dir=a run", "launch.gpus_per_node=1", "--dry-run") == 0
    words = shlex.split(capsys.readouterr().out)
    run_dir = Path("a run").absolute()
    assert launch(shards, "run_dir=r", "launch.nodes=2", "--dry-run") == 2
    assert words[-6:] == [sys.executable, "-m", "seer", "train", "--frozen", f"{run_dir}/launch/config.yaml"]
    assert f"SEER_STATUS_FILE={run_dir}/launch/status.json" in words[:-6]
    assert launch(shards, "run_dir=a run", "--dry-run") == 0
    words = shlex.split(capsys.readouterr().out)
    assert "torch.distributed.run" in words and words[words.index("--nproc-per-node") + 1] == "2"
    assert there() == []


def test_a_job(programs: Programs, shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run_dir=runs/a b", "launch=slurm", "launch.nodes=2", "train.global_batch_size=16"]
    assert launch(shards, *words, "--dry-run") == 0
    text = capsys.readouterr().out
    assert there() == [] and programs.calls("sbatch") == []
    assert launch(shards, *words) == 0
    run_dir = Path("runs/a b").absolute()
    assert capsys.readouterr().out.splitlines() == [
        "started  job 17 (2 nodes x 8 GPUs)",
        f"run_dir  {run_dir}",
        f"follow   tail -F '{run_dir}/launch/17_0_log.out'",
        f"runs     seer runs {run_dir.parent}",
        "stop     scancel --signal=TERM 17   (saves first; the same seer launch goes on; while it is still queued: "
        "scancel 17)",
    ]
    assert (run_dir / "launch" / "17_submission.sh").read_text() == text
    frozen = thaw(yaml.safe_load((run_dir / "launch" / "config.yaml").read_text()))
    assert frozen.run_dir == str(run_dir) and frozen.data.shards == [shards] and frozen.launch.nodes == 2
    assert sorted(path.name for path in run_dir.iterdir()) == ["launch"]


def test_a_job_in_the_queue_keeps_others_out(
    programs: Programs, shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(shards, "run_dir=r", "launch=slurm", "launch.gpus_per_node=8") == 0
    programs.add("squeue", "17|PENDING|Resources\n")
    before = there()
    for where in ("slurm", "local"):
        assert launch(shards, "run_dir=r", f"launch={where}") == 2
        assert "is in use by job 17 (PENDING)" in capsys.readouterr().err
    assert there() == before and len(programs.calls("sbatch")) == 1


def test_wait_returns_the_exit_code_of_the_job(
    programs: Programs, shards: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seer.launching.submission._POLL_SECONDS", 0.01)
    programs.add("squeue", first="echo '{\"exit_code\": 75}' >r/launch/status.json")
    assert launch(shards, "run_dir=r", "launch=slurm", "--wait") == 75


def test_two_processes_train_here(programs: Programs, shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The product from end to end: the frozen code of RUN/launch under torchrun, on two CPU processes."""
    assert launch(shards, "run_dir=r", "launch.gpus_per_node=2", "--wait") == 0, capsys.readouterr()
    out = capsys.readouterr().out
    run_dir = Path("r").absolute()
    assert out.splitlines()[0].startswith("started  process ") and "(1 node x 2 CPU processes)" in out
    stop = f"stop     kill -TERM $(cat {run_dir}/launch/rank-0.pid)   (saves first; the same seer launch goes on)"
    assert stop in out.splitlines()
    assert "step 1/1" in out and "finished: 1 step in " in out
    assert json.loads((run_dir / "launch" / "status.json").read_text()) == {"exit_code": 0, "message": None}
    assert (run_dir / "launch" / "rank-1.log").exists()
    assert launch(shards, "run_dir=r", "launch.gpus_per_node=1", "seed=3") == 2
    assert "seed: 0 -> 3" in capsys.readouterr().err
    # It is finished: nothing is started for it any more, here or in a queue.
    before = {file: file.stat().st_mtime_ns for file in Path("r").rglob("*")}
    for words in (["launch=local", "--wait"], ["launch=slurm"], ["launch=slurm", "--dry-run"]):
        assert launch(shards, "run_dir=r", "launch.gpus_per_node=2", *words) == 0
        said = f"{run_dir} is finished (1 step); delete it or name another run_dir to train anew\n"
        assert capsys.readouterr() == (said, "")
    assert {file: file.stat().st_mtime_ns for file in Path("r").rglob("*")} == before
    assert programs.calls("sbatch") == []


def test_help_lists_the_keys_of_launch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Examples:\n  seer launch ")
    assert "\n  launch.time_limit_minutes=1440" in text and "\n  launch.partition=null" in text
    assert "train.steps" not in text and "--dry-run" in text
