"""The list of shards: what it knows without opening an index, and what it does when that is wrong."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from indexed_shards import shard

from seer import shard_list, shard_manifest
from seer.errors import UserError
from seer.shard_index import ShardIndex, index_path
from seer.shard_list import ShardList


def listed(folder: Path, shards: list[ShardIndex]) -> None:
    shard_manifest.write(folder, [shard_manifest.entry(one, one.name) for one in shards])


def test_a_list_knows_its_counts(tmp_path: Path) -> None:
    for name, count in (("b", 0), ("a", 3), ("c", 5)):
        shard(tmp_path / f"{name}.tar", count)
    shards = ShardList.open([f"{tmp_path}/*.tar"])
    assert shards.counts.tolist() == [3, 0, 5] and shards.counts.dtype == np.int64
    assert (shards.samples, len(shards)) == (8, 3)


def test_the_digest_depends_on_names_counts_and_contents_but_not_on_folders(tmp_path: Path) -> None:
    here, there = tmp_path / "z", tmp_path / "a" / "deeper"
    for name, count in (("a", 3), ("b", 4)):
        shard(here / f"{name}.tar", count)
    whole = ShardList.open([f"{here}/*.tar"])
    shutil.copytree(here, there)
    assert ShardList.open([f"{there}/*.tar"]).digest == whole.digest
    # One shard here, one there: the order is that of the names.
    mixed = ShardList.open([f"{here}/b.tar", f"{there}/a.tar"])
    assert mixed.digest == whole.digest and mixed.counts.tolist() == [3, 4]
    others = [ShardList.open([f"{here}/a.tar"])]
    shard(there / "b.tar", 5)
    others.append(ShardList.open([f"{there}/*.tar"]))
    shard(there / "b.tar", 4, digest="cd" * 16)
    others.append(ShardList.open([f"{there}/*.tar"]))
    (there / "b.tar").rename(there / "c.tar")
    index_path(there / "b.tar").rename(index_path(there / "c.tar"))
    others.append(ShardList.open([f"{there}/*.tar"]))
    assert len({whole.digest, *(other.digest for other in others)}) == 5


def test_equal_names_in_two_folders_have_one_order(tmp_path: Path) -> None:
    first, second = tmp_path / "x" / "a.tar", tmp_path / "y" / "a.tar"
    shard(first, 3, digest="ff" * 16)
    shard(second, 4, digest="00" * 16)
    shards = ShardList.open([str(first), str(second)])
    assert shards.counts.tolist() == [4, 3]  # by digest, as if the folders had other names


def test_shards_without_images_are_refused(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", 0)
    with pytest.raises(UserError, match="hold no image"):
        ShardList.open([f"{tmp_path}/a.tar"])


def test_a_folders_list_says_the_same_as_the_indexes(tmp_path: Path) -> None:
    shards = [shard(tmp_path / f"{name}.tar", count) for name, count in (("a", 3), ("b", 0), ("c", 5))]
    by_index = ShardList.open(f"{tmp_path}/*.tar")
    listed(tmp_path, shards)
    by_list = ShardList.open(f"{tmp_path}/*.tar")
    assert (by_list.digest, by_list.listed) == (by_index.digest, by_index.listed)
    for number, one in enumerate(shards):
        assert by_list[number].offsets.tolist() == one.offsets.tolist()


def test_of_many_shards_no_index_is_opened_before_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_list, "_FEW", 2)
    monkeypatch.setattr(shard_list, "_HELD_SAMPLES", 9)
    opened: list[str] = []
    load = shard_list.load_index
    monkeypatch.setattr(
        shard_list,
        "load_index",
        lambda tar, index_dir, patience: (opened.append(os.path.basename(tar)), load(tar, index_dir))[1],
    )
    listed(tmp_path, [shard(tmp_path / f"{name}.tar", 4) for name in "abc"])
    shard(tmp_path / "d.tar", 4)  # it came later, and nobody has listed it
    shards = ShardList.open(f"{tmp_path}/*.tar")
    assert opened == ["d.tar"] and shards.samples == 16
    for number in (0, 1, 0, 2, 2, 1, 3):
        assert shards[number].name == shards.listed[number].name
    assert opened == ["d.tar", "a.tar", "b.tar", "c.tar"]  # eight samples are held, and the one that was given
    assert shards[0].name == "a.tar" and opened[4:] == ["a.tar"]
    copy = pickle.loads(pickle.dumps(shards))
    assert copy[0].name == "a.tar" and len(opened) == 6  # what was loaded stays behind


def test_a_list_that_does_not_fit_its_indexes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = shard(tmp_path / "a.tar", 4)
    for field, value in (("samples", 5), ("digest", "cd" * 16)):
        entry = {**shard_manifest.entry(one, one.name), field: value}
        shard_manifest.write(tmp_path, [entry])  # type: ignore[list-item]
        with pytest.raises(
            UserError, match=r"does not fit manifest.json beside it: .*run: seer shards index '.*a.tar'"
        ):
            ShardList.open(f"{tmp_path}/*.tar")
    # A tar of another size: the list is older, and the index counts.
    entry = {**shard_manifest.entry(one, one.name), "bytes": 999, "samples": 5}
    shard_manifest.write(tmp_path, [entry])  # type: ignore[list-item]
    assert ShardList.open(f"{tmp_path}/*.tar").samples == 4


@pytest.mark.parametrize(
    "entry",
    [
        {},
        7,
        None,
        {"name": "a.tar", "samples": -1, "bytes": 1000, "digest": "ab" * 16},
        {"name": "a.tar", "samples": 10**30, "bytes": 1000, "digest": "ab" * 16},
        {"name": "a.tar", "samples": 3.0, "bytes": 1000, "digest": "ab" * 16},
        {"name": "a.tar", "samples": 3, "bytes": 1000, "digest": 7},
        {"name": "a.tar", "samples": 3, "bytes": 1000, "digest": "AB"},
        {"name": ["a.tar"], "samples": 3, "bytes": 1000, "digest": "ab" * 16},
    ],
)
def test_an_edited_list_is_passed_over(tmp_path: Path, entry: object) -> None:
    shard(tmp_path / "a.tar", 4)
    content = {"format": shard_manifest.FORMAT, "samples": 3, "shards": [entry]}
    (tmp_path / shard_manifest.NAME).write_text(json.dumps(content))
    assert ShardList.open(f"{tmp_path}/*.tar").samples == 4


@pytest.mark.parametrize("shards", [None, 5, {}, [{}], ["a.tar"], [{"name": ["a.tar"]}]])
def test_a_manifest_whose_shards_have_no_names_is_nobodys(tmp_path: Path, shards: object) -> None:
    (tmp_path / shard_manifest.NAME).write_text(json.dumps({"format": shard_manifest.FORMAT, "shards": shards}))
    assert shard_manifest.read(tmp_path) is None
    shard(tmp_path / "a.tar", 4)
    assert ShardList.open(f"{tmp_path}/*.tar").samples == 4


_ENTRY = {"name": "a.tar", "samples": 4, "bytes": 1000, "digest": "ab" * 16}


@pytest.mark.parametrize(
    "content",
    [
        "[" * 200_000,
        '{"a":' * 200_000,
        *(
            json.dumps({"shards": [_ENTRY | {"name": name}]})
            for name in ("../a.tar", "/a.tar", "..", "a\0", "\ud800", "")
        ),
        *(json.dumps({"shards": [_ENTRY], "classes": classes}) for classes in (5, "ab", {"a": 1}, [["a"]], [None])),
        json.dumps({"shards": [_ENTRY | {"bytes": 2**63}]}),
        json.dumps({"shards": [_ENTRY | {"samples": math.nan}]}),
        '{"shards": [' + '{"samples": 1e400}]}',
    ],
)
def test_a_list_made_to_do_harm_is_passed_over(tmp_path: Path, content: str) -> None:
    file = tmp_path / shard_manifest.NAME
    for sound in (
        {"shards": [_ENTRY], "classes": ["\x1b[2J", "\udcff"]},
        {"shards": [_ENTRY | {"name": "\udcff.tar"}]},
    ):
        file.write_text(json.dumps(sound | {"format": shard_manifest.FORMAT}))
        assert shard_manifest.read(tmp_path) is not None
    file.write_text(content.replace("{", f'{{"format": "{shard_manifest.FORMAT}", ', 1))
    assert shard_manifest.read(tmp_path) is None
    shard(tmp_path / "a.tar", 4)
    assert ShardList.open(f"{tmp_path}/*.tar").samples == 4


def test_a_list_that_never_ends_is_not_begun(tmp_path: Path) -> None:
    file = tmp_path / shard_manifest.NAME
    os.mkfifo(file)
    assert shard_manifest.read(tmp_path) is None
    file.unlink()
    with open(file, "wb") as stream:
        stream.truncate(2**40)
    assert shard_manifest.read(tmp_path) is None


_MEASURED = r"""
import re, sys, time
from seer.shard_list import ShardList
began = time.process_time()
shards = ShardList.open(sys.argv[1])
seconds = time.process_time() - began
most = re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())
print(seconds, int(most[1]) * 1024, len(shards), shards.samples)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_billion_images_are_listed_in_two_seconds_and_500_mb(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(9_000, 11_000, (20, 5_000))
    for number, of_folder in enumerate(counts):
        folder = tmp_path / f"part-{number:02d}"
        folder.mkdir()
        entries = []
        for place, count in enumerate(of_folder.tolist()):
            name = f"{number:02d}-{place:06d}.tar"
            (folder / name).touch()
            entries.append(shard_manifest.Entry(name=name, samples=count, bytes=0, digest=f"{number:016x}{place:016x}"))
        shard_manifest.write(folder, entries)
    command = [sys.executable, "-c", _MEASURED, f"{tmp_path}/*/*.tar"]
    seconds, memory, shards, samples = map(float, subprocess.check_output(command).split())
    print(f"{shards:,.0f} shards, {samples:,.0f} images: {seconds:.2f} s of CPU time, {memory / 1e6:.0f} MB")
    assert (shards, samples) == (100_000, counts.sum())
    assert seconds < 2 and memory < 500e6
