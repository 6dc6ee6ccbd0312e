"""A run's folder: one writer, one configuration, nothing half-made."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from recorded_run import recorded_run

from seer.config import TrainConfig, freeze
from seer.errors import UserError
from seer.run_directory import RunDirectory, check_can_run, read_result, read_run, read_shards, recorded_data

CONFIG = {
    "run_dir": "RUN",
    "seed": 3,
    "data": {"shards": ["a-{0..3}.tar"], "workers": 2, "index_dir": None, "large": {"count": 2, "size": 96}},
    "backbone": {"name": "tiny"},
    "objective": {"epsilon": 0.02},
    "optimizer": {"weight_decay": 1e-6},
    "train": {"steps": 100, "global_batch_size": 8, "precision": "bf16", "init_from": None, "log_every_steps": 10},
    "checkpoint": {"every_steps": 10},
    "parallel": {"strategy": "auto", "sync_batchnorm": False},
}


def changed(key: str, value: object) -> dict:
    config = json.loads(json.dumps(CONFIG))
    *groups, last = key.split(".")
    place = config
    for group in groups:
        place = place[group]
    place[last] = value
    return config


def test_configuration_comes_back_as_it_was(tmp_path):
    resolved = {"data.workers": SimpleNamespace(value=2, reason="2 cores")}
    with recorded_run(tmp_path / "new" / "run", CONFIG, resolved=resolved) as run:
        assert run.folder == tmp_path / "new" / "run"
        assert run.config == CONFIG
    assert read_run(tmp_path / "new" / "run") == CONFIG
    text = (tmp_path / "new" / "run" / "config.yaml").read_text()
    assert "2 cores" in text
    assert sorted(os.listdir(run.folder)) == ["config.yaml"]


def begun(folder, config, **more):
    """A run that has taken a step."""
    with recorded_run(folder, config, **more) as run:
        run.metrics.touch()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 4),
        ("data.shards", ["b.tar"]),
        ("data.large.size", 64),
        ("backbone.name", "200mf"),
        ("objective.epsilon", 0.03),
        ("optimizer.weight_decay", 0.0),
        ("train.steps", 101),
        ("train.global_batch_size", 16),
        ("train.precision", "fp32"),
        ("train.init_from", "w.safetensors"),
        ("parallel.sync_batchnorm", True),
    ],
)
def test_another_identity_is_refused_by_name(tmp_path, key, value):
    begun(tmp_path, CONFIG)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=rf"{key}: .* -> .*another run_dir.*delete"):
        recorded_run(tmp_path, changed(key, value))
    assert (tmp_path / "config.yaml").read_bytes() == before
    recorded_run(tmp_path, CONFIG).close()  # the refusal gave the lock back


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run_dir", "other"),
        ("data.workers", 7),
        ("data.index_dir", "/x"),
        ("data.allow_growth", True),
        ("train.log_every_steps", 1),
        ("checkpoint.every_steps", 5),
        ("parallel.strategy", "single"),
    ],
)
def test_other_keys_may_change_and_are_recorded(tmp_path, key, value):
    recorded_run(tmp_path, CONFIG).close()
    recorded_run(tmp_path, changed(key, value)).close()
    assert read_run(tmp_path) == changed(key, value)


def test_a_run_goes_on_with_another_cache(tmp_path):
    begun(tmp_path, CONFIG)
    for key, value in (("cache_dir", "/x"), ("cache_gb", 7.5), ("io_timeout_seconds", 7)):
        RunDirectory.open(tmp_path, changed(f"data.{key}", value)).close()


def test_at_most_five_differences_are_listed(tmp_path):
    begun(tmp_path, {"seed": 0, "backbone": {str(i): i for i in range(7)}})
    with pytest.raises(UserError, match="and 2 more") as caught:
        recorded_run(tmp_path, {"seed": 0, "backbone": {str(i): i + 1 for i in range(7)}})
    assert caught.value.what.count("->") == 5


def test_moved_shards_are_the_same_data_if_their_digest_is(tmp_path):
    begun(tmp_path, CONFIG, data={"index_digest": "ab", "areas": [(0.1, 1.0)]})
    moved = changed("data.shards", ["/elsewhere/a-{0..3}.tar"])
    recorded_run(tmp_path, moved, data={"index_digest": "ab", "areas": [(0.1, 1.0)]}).close()
    with pytest.raises(UserError, match=r"data\.shards, contents: ab -> cd"):
        recorded_run(tmp_path, moved, data={"index_digest": "cd", "areas": [(0.1, 1.0)]})
    with pytest.raises(UserError, match=r"allow_growth=true\), go on once with the former shards"):
        recorded_run(tmp_path, moved, data={"index_digest": "cd", "areas": [(0.1, 1.0)]})
    with pytest.raises(UserError, match=r"areas: .*delete the folder$"):
        recorded_run(tmp_path, moved, data={"index_digest": "cd", "areas": [(0.2, 1.0)]})


def test_lanes_are_compared_by_what_they_mean(tmp_path):
    """A run that derived its lanes, or began before they had keys, goes on with the same ones written down."""
    begun(tmp_path, CONFIG, data={"lanes": 1, "window": "epoch"})
    given = changed("data.lanes", 1)
    given["data"]["window_images"] = None
    check_can_run(tmp_path, given)
    recorded_run(tmp_path, given, data={"lanes": 1, "window": "epoch"}).close()
    with pytest.raises(UserError, match=r"\(data\.lanes: 1 -> 64, data\.window_images: 0 -> 40000\)"):
        recorded_run(tmp_path, given, data={"lanes": 64, "window": 40_000})


def test_the_decoder_is_compared_by_what_made_the_crops(tmp_path):
    """A run that took the fastest, or began before the key was there, goes on with the same one written down."""
    run, old = tmp_path / "run", freeze(TrainConfig())
    assert (recorded_data(run) or {}).get("decoder") is None
    recorded_run(run, old, data={"decoder": "pillow"}).close()
    assert (recorded_data(run) or {}).get("decoder") is None, "it has not begun"
    begun(run, old, data={"decoder": "pillow"})
    assert (recorded_data(run) or {}).get("decoder") == "pillow"
    given = freeze(TrainConfig())
    given["data"]["decoder"] = "pillow"
    check_can_run(run, given)
    recorded_run(run, given, data={"decoder": "pillow"}).close()
    with pytest.raises(UserError, match=r"\(data\.decoder: pillow -> simplejpeg\)"):
        recorded_run(run, old, data={"decoder": "simplejpeg"})


def test_a_run_that_took_no_step_binds_nobody(tmp_path):
    recorded_run(tmp_path, CONFIG).close()
    recorded_run(tmp_path, changed("seed", 4)).close()
    assert read_run(tmp_path) == changed("seed", 4)


def test_a_cut_or_edited_configuration_is_noticed(tmp_path):
    begun(tmp_path, CONFIG)
    file = tmp_path / "config.yaml"
    edited = re.sub(r"seed: \d+", "seed: 77", file.read_text())
    file.write_text(edited)
    with pytest.raises(UserError, match="no configuration of a run"):
        read_run(tmp_path)


def test_signed_urls_are_not_saved(tmp_path):
    config = changed("data.shards", ["https://host/a.tar?X-Amz-Signature=secret"])
    recorded_run(tmp_path, config).close()
    assert "secret" not in (tmp_path / "config.yaml").read_text()
    recorded_run(tmp_path, changed("data.shards", ["https://host/a.tar?X-Amz-Signature=renewed"])).close()


def test_a_second_writer_is_refused_and_told_who_is_first(tmp_path):
    with recorded_run(tmp_path, CONFIG):
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on "):
            recorded_run(tmp_path, CONFIG)
        assert read_run(tmp_path) == CONFIG  # looking is allowed
    recorded_run(tmp_path, CONFIG).close()


def test_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = (
        "import sys, time; from seer.run_directory import RunDirectory\n"
        f"run = RunDirectory.open({str(tmp_path)!r}, {CONFIG!r}); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid} "):
            recorded_run(tmp_path, CONFIG)
    finally:
        holder.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, its parent has not looked yet
    recorded_run(tmp_path, CONFIG).close()
    holder.communicate()


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ({}, False),
        ({"boot": "another"}, True),
        ({"started": 1}, True),
        ({"pid": 2**22 + 1}, True),
        ({"host": "elsewhere", "boot": "another"}, False),
    ],
)
def test_who_counts_as_living(tmp_path, change, stale):
    run = recorded_run(tmp_path, CONFIG)
    lock = tmp_path / "run.lock"
    lock.write_text(json.dumps(json.loads(lock.read_text()) | change))
    if stale:
        second = recorded_run(tmp_path, CONFIG)
        run.close()  # what was taken over is not removed by its former holder
        assert lock.exists()
        second.close()
        assert not lock.exists()
    else:
        with pytest.raises(UserError, match="in use"):
            recorded_run(tmp_path, CONFIG)


def test_torn_lock_is_nobodys(tmp_path):
    (tmp_path / "run.lock").write_bytes(b'{"host": "x", ')
    recorded_run(tmp_path, CONFIG).close()


def test_place_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        recorded_run(tmp_path / "file" / "run", CONFIG)
    with pytest.raises(UserError, match="cannot be written"):
        recorded_run("/proc/run", CONFIG)
    assert os.listdir(tmp_path) == ["file"]


def test_failed_start_leaves_no_folder(tmp_path):
    with pytest.raises(AttributeError):
        recorded_run(tmp_path / "a" / "b", CONFIG, resolved={"x": 1})
    assert os.listdir(tmp_path) == []


def test_a_run_that_was_not_recorded_leaves_nothing(tmp_path):
    RunDirectory.open(tmp_path / "a" / "b", CONFIG).close()
    assert os.listdir(tmp_path) == []
    begun(tmp_path / "run", CONFIG)
    RunDirectory.open(tmp_path / "run", CONFIG).close()
    assert read_run(tmp_path / "run") == CONFIG


def test_the_shards_of_a_run(tmp_path):
    assert read_shards(tmp_path / "none") is None
    with recorded_run(tmp_path, CONFIG, data={"index_digest": "ab"}, shards={"sources": ["\udcff"]}) as run:
        assert read_shards(tmp_path) is None, "it has not begun"
        run.metrics.touch()
    assert read_shards(tmp_path) == {"sources": ["\udcff"]}
    (tmp_path / "shards.json").unlink()
    assert read_shards(tmp_path) is None, "it may have begun before that was recorded"
    begun(tmp_path, CONFIG, data={"index_digest": "ab", "joined": [["", 5, 1, "cd"]]}, shards={"sources": []})
    (tmp_path / "shards.json").write_text("[")
    with pytest.raises(UserError, match=r"shards\.json cannot be read"):
        read_shards(tmp_path)
    (tmp_path / "shards.json").unlink()
    with pytest.raises(UserError, match=r"shards\.json is gone: it tells which shards the run learned from"):
        read_shards(tmp_path)


def test_result_is_written_and_updated(tmp_path):
    with recorded_run(tmp_path, CONFIG) as run:
        assert read_result(tmp_path) is None
        run.write_result({"state": "stopped", "steps": 3})
        run.update_result({"state": "finished", "knn_top1": 0.5})
    assert read_result(tmp_path) == {"state": "finished", "steps": 3, "knn_top1": 0.5}


def test_files_of_a_run(tmp_path):
    with recorded_run(tmp_path, CONFIG) as run:
        paths = [run.metrics, run.evaluations, run.quarantine(1), run.checkpoints, run.tensorboard, run.result]
    names = [str(path.relative_to(tmp_path)) for path in paths]
    assert names == [
        "metrics.jsonl",
        "evaluations.jsonl",
        "quarantine/rank-1.jsonl",
        "checkpoints",
        "tensorboard",
        "result.json",
    ]


def test_folder_of_other_files_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    os.utime(tmp_path, ns=(1, 1))
    with pytest.raises(UserError, match=r"holds thesis\.tex\): a run needs a folder of its own"):
        recorded_run(tmp_path, CONFIG)
    assert tmp_path.stat().st_mtime_ns == 1
    assert os.listdir(tmp_path) == ["thesis.tex"] and (tmp_path / "thesis.tex").read_text() == "years of work"


def test_what_a_process_left_that_died_early_hinders_no_run(tmp_path):
    for name in (".probe-7", "run.lock", ".run.lock.7.part", ".config.yaml.7.part"):
        (tmp_path / name).touch()
    recorded_run(tmp_path, CONFIG).close()
    assert read_run(tmp_path) == CONFIG


def test_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is no run"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_run(tmp_path / "none")
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="no configuration of a run"):
        read_run(tmp_path)
    (tmp_path / "config.yaml").write_text("just words")
    with pytest.raises(UserError, match="no configuration of a run"):
        read_run(Path(tmp_path))


def test_a_key_that_came_later_than_the_run_has_its_default_in_it(tmp_path):
    old = freeze(TrainConfig())
    del old["data"]["limits"]["max_bytes"]
    with recorded_run(tmp_path / "run", old, data={"seed": 0}) as run:
        run.metrics.touch()
    new = freeze(TrainConfig())
    recorded_run(tmp_path / "run", new, data={"seed": 0, "limits": [1]}).close()
    new["data"]["limits"]["max_bytes"] = 5
    with pytest.raises(UserError, match=r"data\.limits\.max_bytes: 64000000 -> 5"):
        recorded_run(tmp_path / "run", new, data={"seed": 0})


def test_how_the_shards_are_spelt_does_not_matter_before_a_launch(tmp_path):
    """Their contents, lanes and shares are compared when the run goes on and has looked at them."""
    old, new = freeze(TrainConfig()), freeze(TrainConfig())
    old["data"] |= {"shards": ["s/*.tar"], "mixture": ["web 1 w/*.tar"], "lanes": None}
    with recorded_run(tmp_path / "run", old, data={"lanes": 64}) as run:
        run.metrics.touch()
    new["data"] |= {"shards": ["/a/s/*.tar"], "mixture": ["web 1 /a/w/*.tar"], "lanes": 64}
    check_can_run(tmp_path / "run", new)
    new["data"]["large"]["size"] = 96
    with pytest.raises(UserError, match=r"data\.large\.size: 224 -> 96"):
        check_can_run(tmp_path / "run", new)
