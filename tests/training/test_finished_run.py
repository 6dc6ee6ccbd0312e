"""A finished run, asked for again, prints its result, and does not take other data for those that it learned from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_run import make_shards, tiny_words

from seer.cli.main import main


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """own/, moved/ (the same contents) and web/: three shards each."""
    folder = tmp_path_factory.mktemp("data")
    make_shards(folder / "own")
    make_shards(folder / "web", seed=1)
    shutil.copytree(folder / "own", folder / "moved")
    return folder


def one(name: str) -> str:
    return f"data.shards=FOLDER/{name}/shards/*.tar"


def mixed(**weights: float) -> tuple[str, str]:
    sources = ",".join(f"{name} {weight} FOLDER/{name}/shards/*.tar" for name, weight in weights.items())
    return "data.shards=[]", f"data.mixture=[{sources}]"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Two runs of one step: single and mixture."""
    folder = tmp_path_factory.mktemp("runs")
    assert train(folder / "single", data, one("own")) == 0
    assert train(folder / "mixture", data, *mixed(own=0.5, web=0.5)) == 0
    return folder


def train(run: Path, data: Path, *words: str, verb: str = "train") -> int:
    given = [word.replace("FOLDER", str(data)) for word in ("train.steps=1", *words)]
    return main([verb, *tiny_words(run, "", *given)])


@pytest.mark.parametrize("verb", ["train", "launch"])
@pytest.mark.parametrize(
    ("run", "words", "refused"),
    [
        ("single", (one("own"),), ""),
        ("single", (one("moved"),), ""),
        ("single", (one("own"), "data.decoder=auto", "data.workers=3"), ""),
        ("single", (one("web"),), "shards-000000.tar changed ("),
        ("single", (one("none"),), "no shard matches"),
        ("single", (one("own"), "seed=7"), "seed: 0 -> 7"),
        ("single", (one("own"), "data.lanes=2"), "data.lanes: 1 -> 2"),
        ("single", mixed(own=0.5, web=0.5), "holds a run of another configuration"),
        ("mixture", mixed(own=0.5, web=0.5), ""),
        ("mixture", mixed(own=0.25, web=0.75), "mixture: [['own', 0.5, 3], ['web', 0.5, 3]] -> "),
        ("mixture", mixed(own=0.5, moved=0.5), "holds a run of another configuration"),
        ("mixture", mixed(own=0.5, none=0.5), "no shard matches"),
        ("mixture", (one("own"),), "holds a run of another configuration"),
    ],
)
def test_the_result_or_what_differs(
    runs: Path,
    data: Path,
    run: str,
    words: tuple[str, ...],
    refused: str,
    verb: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    code = train(runs / run, data, *words, verb=verb)
    said = capsys.readouterr()
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before
    if not refused:
        assert code == 0 and said.err == "" and "is finished" in said.out
    else:
        assert code == 2 and said.out == "" and said.err.count("\n") == 1 and refused in said.err


@pytest.mark.parametrize("verb", ["train", "launch"])
def test_the_same_words_do_after_the_data_were_deleted(
    tmp_path: Path, data: Path, runs: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    aside = data.with_name("aside")
    data.rename(aside)
    try:
        for run, words in (("single", (one("own"),)), ("mixture", mixed(own=0.5, web=0.5))):
            capsys.readouterr()
            assert train(runs / run, data, *words, verb=verb) == 0
            assert "is finished" in capsys.readouterr().out
            assert train(runs / run, data, one("moved"), verb=verb) == 2
            assert "no shard matches" in capsys.readouterr().err
    finally:
        aside.rename(data)
