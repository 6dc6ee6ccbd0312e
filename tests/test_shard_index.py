import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from seer.errors import UserError
from seer.shard_index import ShardIndex, ShardList, expand_shards, index_path, load_index, save_index


def shard(tar: Path, count: int = 3, *, digest: str = "ab" * 16, index_dir: Path | None = None) -> ShardIndex:
    tar.parent.mkdir(parents=True, exist_ok=True)
    tar.write_bytes(bytes(1000))
    numbers = np.arange(count)
    index = ShardIndex(
        tar, numbers.astype(np.uint64) * 10, numbers.astype(np.uint32), numbers.astype(np.int32) - 1, 1000, digest
    )
    save_index(index, index_path(tar, index_dir))
    return index


def names(found: list[Path]) -> list[str]:
    return [path.name for path in found]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    for number in range(12):
        (tmp_path / f"train-{number:03d}.tar").write_bytes(b"")
    for name in ("manifest.json", "train-000.tar.seer.npz", ".train-009.tar.7.part"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_an_index_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = shard(tmp_path / "a.tar", 5)
    loaded = load_index(tmp_path / "a.tar")
    assert (loaded.path, loaded.tar_size, loaded.digest, len(loaded)) == (saved.path, 1000, saved.digest, 5)
    for name, dtype in (("offsets", np.uint64), ("sizes", np.uint32), ("labels", np.int32)):
        assert getattr(loaded, name).dtype == dtype
        np.testing.assert_array_equal(getattr(loaded, name), getattr(saved, name))
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.seer.npz"]  # nothing temporary is left


def test_the_largest_numbers_survive(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    with open(tar, "wb") as stream:
        stream.truncate(2**40)  # sparse: no space is taken
    largest = np.array([2**32 - 1], np.uint32)
    index = ShardIndex(tar, np.array([2**39], np.uint64), largest, np.array([2**31 - 1], np.int32), 2**40, "0" * 32)
    save_index(index, index_path(tar))
    loaded = load_index(tar)
    assert (int(loaded.offsets[0]), int(loaded.sizes[0]), int(loaded.labels[0])) == (2**39, 2**32 - 1, 2**31 - 1)


def test_an_index_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    shard(tmp_path / "a.tar", 4, index_dir=tmp_path / "elsewhere")
    assert len(load_index(tmp_path / "a.tar", tmp_path / "elsewhere")) == 4
    with pytest.raises(UserError, match=r"has no index .*run: seer shards index '.*a.tar'$"):
        load_index(tmp_path / "a.tar")
    with pytest.raises(UserError, match="--index-dir"):
        load_index(tmp_path / "a.tar", tmp_path)


def test_a_tar_of_another_size_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(bytes(999))
    with pytest.raises(UserError, match="has 999 bytes, its index says 1000"):
        load_index(tmp_path / "a.tar")


def test_a_missing_tar_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_index(tmp_path / "a.tar")


def test_a_damaged_index_is_named_whatever_the_damage(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    shard(tar)
    file = index_path(tar)
    whole = file.read_bytes()
    damaged = [b"", b"no index", whole[:-1], whole[: len(whole) // 2]]
    damaged += [whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :] for at in range(0, len(whole), 23)]
    # Flags and methods in each member's headers (local: PK 03 04, central: PK 01 02): encrypted, deflated, unknown.
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        places = [found.start() + flags for found in re.finditer(re.escape(mark), whole)]
        damaged += [
            whole[:at] + bytes([value]) + whole[at + 1 :]
            for place in places
            for at, value in ((place, 1), (place, 32), (place + 2, 8), (place + 2, 77))
        ]
    for content in damaged:
        file.write_bytes(content)
        try:
            loaded = load_index(tar)
        except UserError as error:
            assert str(file) in str(error) or "its index says" in str(error)
        else:  # a flip in a field that zip does not check
            np.testing.assert_array_equal(loaded.offsets, [0, 10, 20])


def test_images_beyond_the_end_of_the_tar_are_refused(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    for offset, size in ((999, 2), (2**64 - 1, 2)):
        index = shard(tar)
        wrong = ShardIndex(
            tar, np.array([offset], np.uint64), np.array([size], np.uint32), index.labels[:1], 1000, index.digest
        )
        save_index(wrong, index_path(tar))
        with pytest.raises(UserError, match="is damaged"):
            load_index(tar)


def test_no_pickle_is_loaded(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    shard(tar)
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(canary),)

    evil = np.array([Evil()], dtype=object)
    with open(index_path(tar), "wb") as stream:
        np.savez(stream, header=evil, rows=evil)
    with pytest.raises(UserError, match="is damaged"):
        load_index(tar)
    assert not canary.exists()


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
    assert all(path.is_absolute() for path in found)


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
    monkeypatch.setattr("seer.shard_index._MAX_NAMES", 1000)
    with pytest.raises(UserError, match="names over 1000 shards"):
        expand_shards([f"{tars}/train-{{0..999999999999}}.tar"])


def test_remote_shards_are_refused_without_telling_the_signature() -> None:
    with pytest.raises(UserError, match=r"s3://bucket/a.tar is remote") as caught:
        expand_shards(["s3://bucket/a.tar?X-Amz-Signature=secret"])
    assert "secret" not in str(caught.value)


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
