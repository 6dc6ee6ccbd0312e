"""Samples and lists as wids itself reads them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_tars import write_names

from seer.errors import UserError
from seer.shard_patterns import expand_shards
from seer.shards.index import index
from seer.shards.tar import DamagedTar
from seer.shards.wids import check, count_samples, export

SAMPLE = Path(__file__).parents[2] / "data_shards" / "sample"


def counted_by_wids(tar: Path) -> int:
    from wids.wids import IndexedTarSamples

    with contextlib.redirect_stdout(io.StringIO()):  # it tells of names without a dot
        samples = IndexedTarSamples(path=str(tar))
    try:
        return len(samples)
    finally:
        samples.close()


NAMES = [
    *("a.jpg", "a.cls", "a.seg.png", "b.JPG", "b.jpg", "README", "a.b.jpg", ".hidden.jpg", "x/a.jpg", "x/a.cls"),
    *("x.y/z", "x.y/w", "x.y/z.jpg", "./a.jpg", "./README", "x/._a.jpg", "__meta__.json", "x/.h", "my photo.jpg"),
]


@settings(max_examples=100, deadline=None)
@given(names=st.lists(st.sampled_from(NAMES), unique=True, max_size=8), form=st.sampled_from([0, 1, 2]))
def test_samples_are_counted_as_wids_counts_them(
    names: list[str], form: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tar = tmp_path_factory.getbasetemp() / "count" / "a.tar"
    write_names(tar, *names, form=form, mtime=1.5 if form == 2 else 1)
    assert count_samples(tar) == counted_by_wids(tar)


def test_what_wids_would_read_wrongly_is_refused(tmp_path: Path) -> None:
    long = "folder/" * 20
    tar = write_names(tmp_path / "a.tar", f"{long}a.jpg", f"{long}b.jpg")
    assert counted_by_wids(tar) != 2
    for names, told in (
        ([f"{long}a.jpg"], "beyond the plain header"),
        (["a.jpg", "日.jpg"], "beyond the plain header"),
        (["a\n.jpg"], "beyond the plain header"),
        (["a.jpg", "b.jpg", "a.jpg"], r"'a.jpg' in .* comes twice"),
    ):
        with pytest.raises(UserError, match=told):
            count_samples(write_names(tmp_path / "a.tar", *names))
    large = write_names(tmp_path / "a.tar", "a.jpg", pax_headers={"size": "100"})
    assert count_samples(large) == 1
    data = bytearray(write_names(tmp_path / "a.tar", "a.jpg", form=tarfile.GNU_FORMAT).read_bytes())
    data[124:136] = b"\x80" + (100).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    large.write_bytes(data)
    with pytest.raises(UserError, match="beyond the plain header"):
        count_samples(large)


def test_a_tar_that_is_damaged_or_missing_is_named(tmp_path: Path) -> None:
    tar = write_names(tmp_path / "a.tar", "a.jpg", "b.jpg")
    tar.write_bytes(tar.read_bytes()[:1024])
    with pytest.raises(DamagedTar):
        export([tar], tmp_path / "set.json")
    with pytest.raises(UserError, match="No such file"):
        count_samples(tmp_path / "none.tar")
    assert os.listdir(tmp_path) == ["a.tar"]


def test_wids_returns_every_sample_by_our_list(tmp_path: Path) -> None:
    from wids import ShardListDataset
    from wids.wids import DefaultLocalname

    for split in ("train", "val"):
        shutil.copytree(SAMPLE / split, tmp_path / "in" / "shards" / split)
    elsewhere = write_names(tmp_path / "elsewhere" / "z.tar", "a.jpg", "a.txt", "b.txt", "README", "c.cls")
    tars = expand_shards([f"{tmp_path}/in/shards/*/*.tar", str(elsewhere)])
    file = tmp_path / "in" / "set.json"
    listed = export([Path(tar) for tar in tars], file, workers=2)

    expected: list[dict[str, Any]] = []
    for path in tars:
        groups: dict[str, dict[str, Any]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, dot, extension = member.name.partition(".")
                if dot:
                    content = tar.extractfile(member)
                    assert content is not None
                    groups.setdefault(key, {"__key__": key})[f".{extension}"] = content.read()
        expected += groups.values()
    assert len(expected) == 63 == sum(shard.samples for shard in listed)

    with contextlib.redirect_stderr(io.StringIO()):
        theirs = ShardListDataset(str(file), localname=DefaultLocalname(str(tmp_path / "cache")), transformations=[])
    assert len(theirs) == 63
    for number, sample in enumerate(expected):
        found = {
            word: value.read() if hasattr(value, "read") else value
            for word, value in theirs[number].items()
            if not word.startswith("__") or word == "__key__"
        }
        assert found == sample
    theirs.close()
    for shard in json.loads(file.read_bytes())["shardlist"]:
        data = (file.parent / shard["url"]).read_bytes()
        assert (shard["filesize"], shard["md5sum"]) == (len(data), hashlib.md5(data).hexdigest())


def test_the_same_list_again_and_another_one(tmp_path: Path) -> None:
    tar, file = write_names(tmp_path / "a.tar", "a.jpg"), tmp_path / "set.json"
    export([tar], file)
    before = file.stat().st_mtime_ns, file.read_bytes()
    export([tar], file)
    assert (file.stat().st_mtime_ns, file.read_bytes()) == before
    more = [tar, write_names(tmp_path / "b.tar", "b.jpg")]
    with pytest.raises(UserError, match=r"set\.json says something else: .*--overwrite"):
        export(more, file)
    assert file.read_bytes() == before[1]
    export(more, file, overwrite=True)
    assert len(json.loads(file.read_bytes())["shardlist"]) == 2
    with pytest.raises(UserError, match=r"set\.json cannot be written"):
        export(more, tmp_path / "none" / "set.json")


@pytest.fixture
def described(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A list of two tars, which agrees with them, and its content."""
    tars = [write_names(tmp_path / name, "a.jpg", "b.jpg", "b.txt", "c.txt") for name in ("a.tar", "b.tar")]
    export(tars, tmp_path / "set.json")
    return tmp_path / "set.json", json.loads((tmp_path / "set.json").read_bytes())


def test_a_list_that_agrees(described: tuple[Path, dict[str, Any]]) -> None:
    file, content = described
    check([str(file)])
    content["shardlist"][0]["md5sum"] = content["shardlist"][0]["md5sum"].upper()
    content["shardlist"][1] = {"url": "b.tar", "nsamples": 3}
    file.write_text(json.dumps(content))
    check([str(file)], workers=2)


@pytest.mark.parametrize(
    ("word", "value", "told"),
    [
        ("nsamples", 2, r"b\.tar has 3 samples, .*set\.json lists 2: "),
        ("nsamples", 2**62, r"b\.tar has 3 samples, .*set\.json lists 4611686018427387904: "),
        ("filesize", 5, r"b\.tar has 10240 bytes, .*set\.json lists 5: "),
        ("md5sum", "0" * 32, r"b\.tar has the MD5 [0-9a-f]{32}, .*set\.json lists 0{32}: "),
    ],
)
def test_a_list_of_other_tars_is_refused(
    described: tuple[Path, dict[str, Any]], word: str, value: object, told: str
) -> None:
    file, content = described
    content["shardlist"][1][word] = value
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=told):
        check([str(file)])


def test_only_the_listed_tars_are_indexed(described: tuple[Path, dict[str, Any]]) -> None:
    file, content = described
    del content["shardlist"][0]
    file.write_text(json.dumps(content))
    assert [len(shard) for shard in index([str(file)]).shards] == [2]
    assert sorted(path.name for path in file.parent.glob("*.npz")) == ["b.tar.seer.npz"]
