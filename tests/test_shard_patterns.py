import os
import re
from pathlib import Path

import pytest

from seer import shard_patterns
from seer.errors import UserError
from seer.shard_patterns import expand_shards


def names(found: list[str]) -> list[str]:
    return [os.path.basename(path) for path in found]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    for number in range(12):
        (tmp_path / f"train-{number:03d}.tar").write_bytes(b"")
    for name in ("manifest.json", "train-000.tar.seer.npz", ".train-009.tar.7.part"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("*.tar", range(12)),
        ("train-{000..011}.tar", range(12)),
        ("train-{003..005}.tar", [3, 4, 5]),
        ("train-{001,007}.tar", [1, 7]),
        ("train-0{0,1}[01].tar", [0, 1, 10, 11]),
        ("train-{00{1,2},003}.tar", [1, 2, 3]),
        ("train-00?.tar", range(10)),
        ("train-00[2-4].tar", [2, 3, 4]),
        ("**/train-001.tar", [1]),
        ("*", range(12)),
    ],
)
def test_patterns(tars: Path, pattern: str, numbers: list[int]) -> None:
    assert names(expand_shards([f"{tars}/{pattern}"])) == [f"train-{number:03d}.tar" for number in numbers]


def test_patterns_are_sorted_and_without_repetition(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tars)
    found = expand_shards(["train-00[5-9].tar", f"{tars}/train-007.tar", "./train-000.tar"])
    assert names(found) == [f"train-{number:03d}.tar" for number in (0, 5, 6, 7, 8, 9)]
    assert all(os.path.isabs(path) for path in found)


def test_the_home_folder(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tars))
    assert len(expand_shards(["~/*.tar"])) == 12
    assert len(expand_shards(["~/train-001.tar"])) == 1


@pytest.mark.parametrize("folder", ["photos [2024]", "a=b, c", "{x,y}", "2024_01", "~", "st*r", "ünï", "q?'\"$x"])
def test_folders_with_any_name(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "a [1]{2}.tar").write_bytes(b"")
    for pattern in (f"{tmp_path}/{folder}/*.tar", f"{tmp_path}/{folder}/a [1]{{2}}.tar"):
        assert names(expand_shards([pattern])) == ["a [1]{2}.tar"]
    if folder != "~":
        assert names(expand_shards([f"{folder}/*.tar"])) == ["a [1]{2}.tar"]


def test_a_name_that_exists_is_taken_literally(tmp_path: Path) -> None:
    for name in ("a[1].tar", "a1.tar"):
        (tmp_path / name).write_bytes(b"")
    assert names(expand_shards([f"{tmp_path}/a[1].tar"])) == ["a[1].tar"]
    assert names(expand_shards([f"{tmp_path}/a?.tar"])) == ["a1.tar"]


@pytest.mark.parametrize("pattern", ["val-*.tar", "nothing.tar", "train-{100..101}.tar", "{.tar", "a{b}.tar"])
def test_what_matches_nothing_is_named(tars: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"no shard matches {tars}/{pattern}: ")):
        expand_shards([f"{tars}/*.tar", f"{tars}/{pattern}"])


def test_braces_name_every_shard(tars: Path) -> None:
    with pytest.raises(UserError, match=r"names 2 shards that do not exist, first .*train-012.tar"):
        expand_shards([f"{tars}/train-{{010..013}}.tar"])


def test_a_folder_and_other_files_are_no_shards(tars: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder: .* write '.*/\*.tar'"):
        expand_shards([f"{tars}/"])
    with pytest.raises(UserError, match=r"manifest.json does not end in .tar"):
        expand_shards([f"{tars}/*.json"])


def test_an_endless_list_is_refused_before_it_eats_the_memory(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seer.shard_patterns._MAX_NAMES", 1000)
    with pytest.raises(UserError, match="names over 1000 shards"):
        expand_shards([f"{tars}/train-{{0..999999999999}}.tar"])


@pytest.mark.parametrize("pattern", ["ftp://me:secret@host/a.tar?Signature=secret", "pipe:cat secret/a.tar"])
def test_what_no_client_reads_is_refused_without_telling_secrets(pattern: str) -> None:
    with pytest.raises(
        UserError, match=r"^(ftp|pipe): cannot be read: shards are files or http, https, s3, gs"
    ) as caught:
        expand_shards([pattern])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["{0..9999999999}", "{a,b}" * 40, "{a,b}" * 2000, "{{a,b}," * 2000])
def test_braces_that_explode(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_patterns, "_MAX_NAMES", 1000)
    with pytest.raises(UserError, match="names over 1000 shards"):
        expand_shards([f"https://127.0.0.1/{pattern}.tar"])


def test_a_number_that_is_too_long_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shard matches"):
        expand_shards([f"{tmp_path}/{{0..{'9' * 5000}}}.tar"])
