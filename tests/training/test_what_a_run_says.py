"""The words of a run: counts agree with their nouns, and nothing is said that means nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from remote_servers import web_server
from tiny_run import make_images, make_shards, tiny_config

from seer.shards.pack import pack
from seer.training import loop


def test_a_run_of_few_steps(tmp_path: Path, shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = make_shards(tmp_path, classes=1, seed=1)
    mixture = ("data.shards=[]", f"data.mixture=[web 0.75 {shards},own 0.25 {more}]", "train.log_every_steps=10")
    loop.run(tiny_config(tmp_path / "run", "", *mixture))
    said = capsys.readouterr().out
    assert "\n  data.mixture = web 6, own 2: images of each source" in said
    assert "\n  first news after 6 steps\n" in said
    assert "\nfinished: 6 steps in " in said and " 0 min" not in said
    assert "bad" not in said and "has not left chance" not in said


def test_one_step_of_one_remote_shard_with_bad_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, path in enumerate(sorted(make_images(tmp_path / "images").rglob("*.png"))):
        if number % 6 == 0:
            path.write_bytes(b"<html>not found</html>")
    pack(tmp_path / "images", tmp_path / "shards", workers=1)
    (tar,) = (tmp_path / "shards").glob("*.tar")
    with web_server(tmp_path / "shards") as server:
        config = (f"data.cache_dir={tmp_path / 'cache'}", "train.steps=3", "data.max_bad_share=1")
        result = loop.run(tiny_config(tmp_path / "run", f"{server.url}/{tar.name}", *config)).result
    said, bad = capsys.readouterr().out, result["bad_samples"]
    assert bad > 1
    assert f"\n  1 remote shard ({tar.stat().st_size / 1000:.3g} kB), kept in " in said
    assert "\n  first news after 1 step\n" in said
    assert f"\n{bad} bad images replaced (quarantine/rank-*.jsonl)\n" in said and f"  {bad} bad\n" in said


@pytest.mark.parametrize(
    ("steps", "total", "loss", "told"),
    [(1000, 2000, 4.15, True), (3, 2000, 4.15, False), (1000, 100_000, 4.15, False), (1000, 2000, 3.0, False)],
)
def test_a_loss_at_chance_is_told_where_it_means_something(
    tmp_path: Path, steps: int, total: int, loss: float, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"state": "stopped", "steps": steps, "seconds": 9.0, "loss": loss, "chance": 4.159}
    config = tiny_config(tmp_path, "a.tar", f"train.steps={total}")
    loop._conclude(config, result | {"bad_samples": 0, "exports": []})
    assert ("the loss has not left chance" in capsys.readouterr().out) == told
