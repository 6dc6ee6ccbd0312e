"""Lists of shards from elsewhere: what they may say, and that nothing else is taken from them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seer.errors import UserError
from seer.shard_patterns import expand_shards
from seer.wids_json import Listed, list_bytes, read_list


def made(folder: Path, *names: str) -> list[str]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"tar")
    return [str(folder / name) for name in names]


def listed(file: Path, *entries: Any, **more: Any) -> str:
    content = {"wids_version": 1, "shardlist": list(entries), **more}
    file.write_text(json.dumps(content))
    return str(file)


def refused(file: str) -> str:
    with pytest.raises(UserError) as caught:
        read_list(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    first, second = made(tmp_path, "b/my shard.tar", "a.tar")
    shards = [Listed(first, 5, 3, "ab" * 16), Listed(second, 0, 2**62, "0" * 32)]
    file = tmp_path / "set.json"
    file.write_bytes(list_bytes(file, shards))
    assert read_list(str(file)) == shards
    content = json.loads(file.read_bytes())
    assert [shard["url"] for shard in content["shardlist"]] == ["b/my shard.tar", "a.tar"]
    assert content["name"] == "set"


def test_what_a_list_does_not_tell_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tar,) = made(tmp_path, "a.tar")
    listed(tmp_path / "set.json", {"url": "./a.tar", "nsamples": 7}, name="theirs", info="words")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_list("set.json") == read_list("~/set.json") == [Listed(tar, 7)]


def test_a_list_is_a_pattern_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars = made(tmp_path, "b.tar", "sub/a.tar", "not_listed.tar")
    file = listed(tmp_path / "set.json", {"url": "b.tar", "nsamples": 1}, {"url": "sub/a.tar", "nsamples": 1})
    assert [str(tar) for tar in expand_shards([file])] == [tars[1], tars[0]]
    assert [str(tar) for tar in expand_shards([file, tars[0], tars[2]])] == [tars[1], tars[0], tars[2]]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(expand_shards(["~/set.json"])) == 2
    with pytest.raises(UserError, match=r"no shard matches .*none\.json: there is no such file"):
        expand_shards([str(tmp_path / "none.json")])


OUTSIDE = "only tars below the folder of the list"


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"url": "pipe:touch canary", "nsamples": 1}, OUTSIDE),
        ({"url": "PIPE:touch canary", "nsamples": 1}, OUTSIDE),
        ({"url": "http://example.org/a.tar", "nsamples": 1}, OUTSIDE),
        ({"url": "s3://bucket/a.tar", "nsamples": 1}, OUTSIDE),
        ({"url": "file:a.tar", "nsamples": 1}, OUTSIDE),
        ({"url": "/etc/hostname", "nsamples": 1}, OUTSIDE),
        ({"url": "//host/a.tar", "nsamples": 1}, OUTSIDE),
        ({"url": "../a.tar", "nsamples": 1}, OUTSIDE),
        ({"url": "sub/../../a.tar", "nsamples": 1}, OUTSIDE),
        ({"url": "none.tar", "nsamples": 1}, "is missing: "),
        ({"url": ".", "nsamples": 1}, "is missing: "),
        ({"url": "a\0.tar", "nsamples": 1}, "is missing: "),
        ({"url": "\ud800\n\x1b[31m.tar", "nsamples": 1}, "is missing: "),
        ({"url": "x" * 10**6, "nsamples": 1}, "is missing: "),
        ({"url": "", "nsamples": 1}, "it is the path of a tar"),
        ({"url": ["a.tar"], "nsamples": 1}, "it is the path of a tar"),
        ({"nsamples": 1}, "has the url None"),
        ("a.tar", "a shard is an object"),
        (None, "a shard is an object"),
        ({"url": "a.tar"}, "has nsamples None"),
        ({"url": "a.tar", "nsamples": -1}, "has nsamples -1"),
        ({"url": "a.tar", "nsamples": 1.5}, "has nsamples 1.5"),
        ({"url": "a.tar", "nsamples": True}, "has nsamples True"),
        ({"url": "a.tar", "nsamples": "1"}, "has nsamples '1'"),
        ({"url": "a.tar", "nsamples": 2**63}, "has nsamples 9223372036854775808"),
        ({"url": "a.tar", "nsamples": 1, "filesize": -3}, "has filesize -3"),
        ({"url": "a.tar", "nsamples": 1, "filesize": 1e300}, "has filesize 1e+300"),
        ({"url": "a.tar", "nsamples": 1, "md5sum": "abc"}, "has md5sum 'abc'"),
        ({"url": "a.tar", "nsamples": 1, "md5sum": 5}, "has md5sum 5"),
    ],
)
def test_an_entry_that_is_none(tmp_path: Path, entry: Any, told: str) -> None:
    made(tmp_path, "in/a.tar", "a.tar")
    good = {"url": "a.tar", "nsamples": 1}
    assert told in refused(listed(tmp_path / "in" / "set.json", good, entry))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"not json", "is no JSON"),
        (b'{"wids_version": 1, "shardlist": [', "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b'{"wids_version": ' + b"9" * 10_000 + b"}", "is no JSON"),
        (b"[]", "is no list of shards"),
        (b'{"shardlist": [{"url": "a.tar", "nsamples": 1}]}', "is no list of shards"),
        (b'{"wids_version": 2, "shardlist": [{"url": "a.tar", "nsamples": 1}]}', "is no list of shards"),
        (b'{"wids_version": true, "shardlist": [{"url": "a.tar", "nsamples": 1}]}', "is no list of shards"),
        (b'{"wids_version": 1, "shardlist": {}}', "is no list of shards"),
        (b'{"wids_version": 1, "shardlist": []}', "lists no shard"),
        (b'{"wids_version": 1, "shardlist": [], "datasets": [{"source_url": "pipe:x"}]}', "names further data sets"),
    ],
)
def test_a_file_that_is_no_list(tmp_path: Path, content: bytes, told: str) -> None:
    made(tmp_path, "a.tar")
    (tmp_path / "set.json").write_bytes(content)
    assert told in refused(str(tmp_path / "set.json"))


def test_a_shard_that_is_listed_twice(tmp_path: Path) -> None:
    made(tmp_path, "a.tar")
    file = listed(tmp_path / "set.json", {"url": "a.tar", "nsamples": 1}, {"url": "b/.././a.tar", "nsamples": 1})
    assert OUTSIDE in refused(file)
    file = listed(tmp_path / "set.json", {"url": "a.tar", "nsamples": 1}, {"url": "././a.tar", "nsamples": 1})
    assert "twice" in refused(file)


def test_a_list_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in refused(str(tmp_path / "none.json"))


@pytest.mark.parametrize("name", ["a;b.tar", "a?b.tar", "a#b.tar", "c:a.tar", "a\n.tar", "a.tar ", "\udcff.tar"])
def test_names_that_wids_would_cut_are_not_listed(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"cannot be listed: wids reads it as a URL"):
        list_bytes(tmp_path / "set.json", [Listed(str(tmp_path / name), 1)])


def test_tars_elsewhere_are_listed_by_absolute_path(tmp_path: Path) -> None:
    tar = str(tmp_path / "tars2" / "a.tar")
    content = json.loads(list_bytes(tmp_path / "tars" / "set.json", [Listed(tar, 1)]))
    assert content["shardlist"][0]["url"] == tar


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["a.tar", "ab" * 16, 1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
ENTRIES = st.fixed_dictionaries(
    {"url": st.just("a.tar") | VALUES, "nsamples": st.just(1) | VALUES},
    optional={"md5sum": st.just("ab" * 16) | VALUES, "filesize": st.just(3) | VALUES},
)
CONTENTS = st.binary(max_size=50) | st.builds(
    lambda version, shards: json.dumps({"wids_version": version, "shardlist": shards}).encode(),
    st.just(1) | VALUES,
    st.lists(ENTRIES, min_size=1, max_size=2) | VALUES,
)


@settings(max_examples=60, deadline=None)
@given(content=CONTENTS)
def test_any_content_is_a_list_of_tars_below_or_one_line(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    made(folder, "a.tar")
    (folder / "set.json").write_bytes(content)
    try:
        found = read_list(str(folder / "set.json"))
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        str(error).encode()
    else:
        assert found and all(os.path.dirname(shard.tar) == str(folder) and shard.samples >= 0 for shard in found)
