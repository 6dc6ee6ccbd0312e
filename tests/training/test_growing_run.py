"""A run whose shards become more: wherever it stopped before they came, it ends as any other with the same history."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import ranks
from tiny_run import make_shards, tiny_config

from seer import build, distributed
from seer.checkpoint.store import CheckpointStore
from seer.config import TrainConfig, freeze
from seer.data.stream import DataStream
from seer.errors import EXIT_STOPPED, ToldElsewhere, UserError
from seer.run_directory import RunDirectory
from seer.training import loop
from seer.training.shards import agreed_history, agreed_shards

STEPS = ("train.steps=10", "checkpoint.every_steps=4")


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images in old/, 6 batches, and 24 in new/; the new shards stand between the old ones in the sorted list."""
    folder = tmp_path_factory.mktemp("collection")
    for name, images in (("old", {}), ("new", {"each": 8, "seed": 1})):
        made = Path(make_shards(folder / name, **images)).parent
        for number, tar in enumerate(sorted(made.glob("*.tar"))):
            for suffix in ("", ".seer.npz"):
                os.rename(f"{tar}{suffix}", folder / name / f"{number}-{name}.tar{suffix}")
        shutil.rmtree(made)
    return folder


def config_of(run: Path, collection: Path, *overrides: str) -> TrainConfig:
    grown = "data.allow_growth=true" in overrides
    return tiny_config(run, f"{collection}/{'*' if grown else 'old'}/*.tar", *STEPS, *overrides)


@pytest.fixture
def lives(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a configuration; asked to stop in a step, it saves after the next one; killed, it saves nothing."""
    step = loop.train_step

    def live(config: TrainConfig, *, stop: int | None = None, kill: int | None = None) -> int:
        def interrupted(state: Any, *args: Any, **more: Any) -> Any:
            outcome = step(state, *args, **more)
            if state.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            if state.step == kill:
                raise KeyboardInterrupt
            return outcome

        monkeypatch.setattr(loop, "train_step", interrupted)
        try:
            return loop.run(config).exit_code
        except KeyboardInterrupt:
            return -1

    return live


def ended(run: Path) -> tuple[list[tuple[int, float, float]], dict[str, torch.Tensor]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    newest = CheckpointStore(run / "checkpoints").newest()
    assert newest is not None
    return [(line["step"], line["loss"], line["epoch"]) for line in lines], newest.tensors()


GROWN = "data.allow_growth=true"


def test_where_it_stopped_before_more_came_does_not_matter(
    tmp_path: Path, collection: Path, lives: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    once, often = tmp_path / "once", tmp_path / "often"
    assert lives(config_of(once, collection), stop=1) == EXIT_STOPPED
    assert lives(config_of(once, collection, GROWN)) == 0
    assert re.findall("\\n(.* new .*)\\n", capsys.readouterr().out) == [
        "2 new shards (24 images) join at epoch 1 (step 6)"
    ]

    assert lives(config_of(often, collection), stop=4) == EXIT_STOPPED
    assert lives(config_of(often, collection, GROWN), kill=7) == -1, "it goes back to step 5, before they joined"
    capsys.readouterr()
    assert lives(config_of(often, collection, GROWN), kill=9) == -1
    assert "2 new shards (24 images) join at epoch 1 (step 6)" in capsys.readouterr().out
    unchanged = tiny_config(often, f"[{collection}/new/*.tar,{collection}/old/*.tar]", *STEPS)
    assert lives(unchanged) == 0, "what has joined is there without the key as well"
    assert "join at" not in capsys.readouterr().out

    (lines, tensors), (others, other_tensors) = ended(once), ended(often)
    assert lines == others
    assert [epoch for _, _, epoch in lines][4:8] == [round(5 / 6, 4), 1.0, round(1 + 1 / 9, 4), round(1 + 2 / 9, 4)]
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), name
    saved = yaml.safe_load((once / "config.yaml").read_text())
    assert saved["resolved"]["data.lanes"]["reason"] == "48 images are mixed as a whole", "as when it began"
    assert [joined[:3] for joined in saved["data"]["joined"]] == [["", 6, 1]]


def test_what_it_cannot_go_on_with_is_named_and_changes_nothing(
    tmp_path: Path, collection: Path, lives: Callable[..., int]
) -> None:
    run, folder = tmp_path / "run", tmp_path / "collection"
    shutil.copytree(collection, folder)
    assert lives(config_of(run, folder), stop=1) == EXIT_STOPPED
    files = ("config.yaml", "shards.json", "metrics.jsonl")
    before = [(run / name).read_bytes() for name in files]

    with pytest.raises(
        UserError, match=r"data.shards names 0-new.tar and 1 more \(24 images\), which .*allow_growth=true"
    ):
        loop.run(tiny_config(run, f"{folder}/*/*.tar", *STEPS))
    os.rename(folder / "old" / "1-old.tar", folder / "1-old.tar")
    with pytest.raises(UserError, match=r"data.shards lacks 1-old.tar, which the run knows"):
        loop.run(config_of(run, folder, GROWN))
    assert [(run / name).read_bytes() for name in files] == before and not (run / "run.lock").exists()

    os.rename(folder / "1-old.tar", folder / "old" / "1-old.tar")
    os.remove(run / "shards.json")  # as in a run that began before it was written
    with pytest.raises(UserError, match=r"data.shards, contents: .* go on once with the former shards"):
        loop.run(config_of(run, folder, GROWN))
    assert lives(config_of(run, folder), stop=3) == EXIT_STOPPED
    assert (run / "shards.json").read_bytes() == before[1]
    assert lives(config_of(run, folder, GROWN), stop=5) == EXIT_STOPPED
    os.remove(run / "shards.json")
    with pytest.raises(UserError, match=r"shards.json is gone"):
        loop.run(config_of(run, folder))


def test_a_source_of_a_mixture_grows_alone(
    tmp_path: Path, collection: Path, lives: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    def mixed(pattern: str, *more: str) -> TrainConfig:
        sources = f"data.mixture=[web 3 {collection}/old/*.tar,own 1 {collection}/{pattern}]"
        return tiny_config(tmp_path / "run", "[]", sources, "train.steps=4", *more)

    assert lives(mixed("new/0-new.tar"), stop=1) == EXIT_STOPPED  # 20 images: an epoch of 10 batches
    data = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]
    assert lives(mixed("new/*.tar", GROWN)) == 0
    said = "1 new shard (4 images) of own joins at its epoch 1 (step 10, after the last step of this run)"
    assert said in capsys.readouterr().out
    grown = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]
    (joined,) = grown.pop("joined")
    assert joined[:3] == ["own", 10, 1] and grown == data


def batches_of(config: TrainConfig) -> list[torch.Tensor]:
    """The first crops of batches 4 to 8 of a run that goes on at batch 2, as this rank makes them."""
    opened = agreed_shards(config)
    first = distributed.rank() == 0
    run = RunDirectory.open(config.run_dir, freeze(config)) if first else RunDirectory.join(config.run_dir, {})
    with run:
        history = agreed_history(config, run, 2, *opened)
    stream = build.stream(config, workers=0, decoder="pillow", opened=opened, history=history)
    found = stream.batches(4)
    return [next(found).crops[0].clone() for _ in range(5)]


def test_two_ranks_make_the_batches_of_one(tmp_path: Path, collection: Path, lives: Callable[..., int]) -> None:
    run = tmp_path / "run"
    assert lives(config_of(run, collection), stop=1) == EXIT_STOPPED
    config = config_of(run, collection, GROWN)
    alone = batches_of(config)
    first, second = ranks(2).run(batches_of, config)
    for whole, *parts in zip(alone, first, second, strict=True):
        joined = torch.cat([part.view(2, 4, *whole.shape[1:]) for part in parts], 1)  # crop by crop
        assert torch.equal(joined.reshape(whole.shape), whole)
    assert not torch.equal(alone[2], next(_former(config_of(run, collection)).batches(6)).crops[0])


def _former(config: TrainConfig) -> DataStream:
    return build.stream(config, workers=0, decoder="pillow")


def other_shards(config: TrainConfig, other: TrainConfig) -> str:
    try:
        agreed_shards(other if distributed.rank() else config)
    except (UserError, ToldElsewhere) as refusal:
        return f"{type(refusal).__name__}: {refusal}"
    return ""


def test_a_rank_that_finds_other_shards_ends_all(tmp_path: Path, collection: Path) -> None:
    config, other = (config_of(tmp_path / "run", collection, *more) for more in ((), (GROWN,)))
    first, second = ranks(2).run(other_shards, config, other)
    assert re.match(r"UserError: process 1 on .* finds other shards .*\(5 with 72 images, there 3 with 48\)", first)
    assert second.startswith("ToldElsewhere: ")
