"""Places that cannot hold what a run writes are refused in one line, before anything is announced or made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from remote_servers import WebServer, web_server
from tiny_run import tiny_words

from seer.cli.main import main


@pytest.fixture(scope="module")
def server(shards: str) -> Iterator[WebServer]:
    with web_server(Path(shards).parent) as found:
        yield found


@pytest.fixture
def in_the_way(tmp_path: Path) -> Path:
    file = tmp_path / "a file"
    file.write_text("x")
    return file


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["train", *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


def addresses(server: WebServer) -> str:
    return f"{server.url}/shards-{{000000..000002}}.tar"


def test_a_file_for_the_cache(
    tmp_path: Path, server: WebServer, in_the_way: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny_words(tmp_path / "below" / "run", addresses(server), f"data.cache_dir={in_the_way}")
    assert f"{in_the_way} cannot hold remote shards" in refused(words, capsys)
    assert list(tmp_path.iterdir()) == [in_the_way]


def test_a_file_for_the_cache_of_what_is_evaluated(
    tmp_path: Path, shards: str, server: WebServer, in_the_way: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = addresses(server)
    evaluation = ("evaluation.every_steps=2", f"evaluation.train={where}", f"evaluation.val={where}")
    words = tiny_words(tmp_path / "run", shards, *evaluation, f"data.cache_dir={in_the_way}")
    assert f"{in_the_way} cannot hold remote shards" in refused(words, capsys)
    assert list(tmp_path.iterdir()) == [in_the_way]


@pytest.mark.parametrize("place", ["a file", "a file/below", "/proc/run", "/dev/full/run"])
@pytest.mark.parametrize("verb", ["train", "launch"])
def test_a_place_that_can_be_no_run(
    tmp_path: Path, shards: str, in_the_way: Path, place: str, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, *tiny_words(tmp_path / place, shards)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith(f"seer: {tmp_path / place} cannot be written (")
    assert list(tmp_path.iterdir()) == [in_the_way] and in_the_way.read_text() == "x"
