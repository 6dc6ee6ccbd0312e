import gc
import json
import os
import re
import tarfile
from pathlib import Path

import pytest
from plain_tars import write_tar

from seer import shard_manifest
from seer.errors import UserError
from seer.shard_index import index_path, load_index
from seer.shards.index import Oddities, index, index_tar
from seer.shards.tar import DamagedTar

SAMPLE = Path(__file__).parents[2] / "data_shards" / "sample"


def indexed(path: Path) -> tuple[list[tuple[bytes, int]], Oddities]:
    """(image, label) of each sample through the index, and the oddities."""
    found, odd = index_tar(path)
    data = path.read_bytes()
    images = [data[int(at) : int(at) + int(size)] for at, size in zip(found.offsets, found.sizes, strict=True)]
    return list(zip(images, found.labels.tolist(), strict=True)), odd


def test_images_and_labels_in_any_order(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        ("a.jpg", b"one"), ("a.cls", b"7"), ("a.txt", b"words"),
        ("b.cls", b" 12\n"), ("b.json", b"{}"), ("b.PNG", b"two"),
        ("folder/c.webp", b"three"),
        ("folder/d.cls", b"0"), ("folder/d.jpeg", b"four"),
    )  # fmt: skip
    assert indexed(path) == ([(b"one", 7), (b"two", 12), (b"three", -1), (b"four", 0)], Oddities())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_samples_are_those_of_webdataset(tmp_path: Path) -> None:
    import webdataset

    path = write_tar(
        tmp_path / "a.tar",
        ("a.jpg", b"1"), ("a.seg.png", b"-"), ("x/a.jpg", b"2"), ("x/a.cls", b"5"), ("b.rgb.jpg", b"3"),
        (".hidden.jpg", b"-"), ("noext", b"-"), ("g.jpg", b"4"), ("h.jpg", b"5"),
        ("g.cls", b"9"), ("..", b"-"), ("x.y/z.jpg", b"6"),
    )  # fmt: skip
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    gc.collect()  # its warning belongs to this test
    first = [next((v for k, v in sample.items() if k.endswith("jpg")), None) for sample in theirs]
    ours, odd = indexed(path)
    assert [image for image, _ in ours] == [image for image in first if image] == [b"1", b"2", b"3", b"4", b"5", b"6"]
    # g.cls comes after another sample: a sample of its own without an image, in both.
    assert odd == Oddities(without_image=1)
    assert [label for _, label in ours] == [-1, 5, -1, -1, -1, -1]


def test_hidden_files_in_folders_are_no_samples(tmp_path: Path) -> None:
    # macOS puts ._a.jpg, which is no image, beside a.jpg; WebDataset's own rule would take it for one.
    path = write_tar(tmp_path / "a.tar", ("x/._a.jpg", b"-"), ("x/a.jpg", b"1"))
    assert indexed(path) == ([(b"1", -1)], Oddities())


def test_a_plain_extension_goes_before_a_longer_suffix(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", ("a.depth.png", b"depth"), ("a.png", b"image"))
    assert indexed(path) == ([(b"image", -1)], Oddities())


def test_photographs_that_share_a_key_are_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", ("www.a.com_1.jpg", b"1"), ("www.a.com_2.jpg", b"2"), ("b.jpg", b"3"))
    images, odd = indexed(path)
    assert images == [(b"1", -1), (b"3", -1)] and odd == Oddities(several_images=1)
    assert "1 samples have several images" in odd.sentences()[0]


@pytest.mark.parametrize("text", [b"cat", b"", b"-1", b"1.5", b"99999999999", b"7" * 40, "²".encode(), b"\xff"])
def test_a_label_that_is_none(tmp_path: Path, text: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", ("a.cls", text), ("a.jpg", b"1"), ("b.cls", b"3"), ("b.jpg", b"2"))
    assert indexed(path) == ([(b"1", -1), (b"2", 3)], Oddities(unreadable_labels=1))


def test_a_tar_without_images_has_an_empty_index(tmp_path: Path) -> None:
    assert indexed(write_tar(tmp_path / "a.tar", ("a.txt", b"x"))) == ([], Oddities(without_image=1))
    assert indexed(write_tar(tmp_path / "b.tar")) == ([], Oddities())


def test_indexes_and_a_manifest_are_written(tmp_path: Path) -> None:
    for name in "ba":
        write_tar(tmp_path / f"{name}.tar", (f"{name}.jpg", b"1"), ("c.jpg", b"2"))
    result = index([f"{tmp_path}/*.tar"])
    assert [(shard.name, len(shard)) for shard in result.shards] == [("a.tar", 2), ("b.tar", 2)]
    content = json.loads((tmp_path / "manifest.json").read_bytes())
    assert content["samples"] == 4 and [shard["name"] for shard in content["shards"]] == ["a.tar", "b.tar"]
    assert content["shards"][0]["digest"] == load_index(tmp_path / "a.tar").digest
    names = {"a.tar", "a.tar.seer.npz", "b.tar", "b.tar.seer.npz", "manifest.json"}
    assert set(os.listdir(tmp_path)) == names


def test_a_second_call_reads_nothing_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar", ("a.jpg", b"1"))
    write_tar(tmp_path / "b.tar", ("b.jpg", b"1"))
    index([f"{tmp_path}/a.tar"])
    read: list[Path] = []
    monkeypatch.setattr("seer.shards.index.index_tar", lambda tar: read.append(tar) or index_tar(tar))
    assert index([f"{tmp_path}/*.tar"]).already_there == 1
    assert [tar.name for tar in read] == ["b.tar"]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert index([f"{tmp_path}/*.tar"]).already_there == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps


def test_a_changed_tar_is_indexed_anew_even_at_the_same_size(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", ("a.jpg", b"1"))
    index([str(tar)])
    before = load_index(tar)
    write_tar(tar, ("b.jpg", b"2"))
    os.utime(tar, ns=(0, index_path(tar).stat().st_mtime_ns + 1_000_000))
    index([str(tar)])
    assert load_index(tar).digest != before.digest and load_index(tar).tar_size == before.tar_size


def test_an_index_that_is_damaged_is_made_anew(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", ("a.jpg", b"1"))
    index_path(tar).write_bytes(b"nonsense")
    assert index([str(tar)]).already_there == 0
    assert len(load_index(tar)) == 1


def test_a_folder_for_the_indexes(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "a.tar", ("a.jpg", b"1"))
    elsewhere = tmp_path / "in" / "dexes"
    index([f"{tmp_path}/tars/*.tar"], elsewhere)
    assert set(os.listdir(tmp_path / "tars")) == {"a.tar"}
    assert len(load_index(tmp_path / "tars" / "a.tar", elsewhere)) == 1
    write_tar(tmp_path / "more" / "a.tar", ("a.jpg", b"1"))
    with pytest.raises(UserError, match="have one name"):
        index([f"{tmp_path}/tars/a.tar", f"{tmp_path}/more/a.tar"], elsewhere)


def test_a_folder_that_cannot_be_written_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = write_tar(tmp_path / "a.tar", ("a.jpg", b"1"))

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("seer.shards.index.save_index", refuse)
    with pytest.raises(UserError, match=r"cannot be written .*Read-only.*--index-dir"):
        index([str(tar)])
    with pytest.raises(UserError, match="cannot be made"):
        index([str(tar)], Path("/proc/nothing"))


def test_a_manifest_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = write_tar(tmp_path / "a.tar", ("a.jpg", b"1"))

    def refuse(*_: object, **more: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(shard_manifest, "write", refuse)
    with pytest.raises(UserError, match=r"manifest\.json cannot be written \(Read-only.*--index-dir"):
        index([str(tar)])


def test_a_damaged_tar_is_told_after_the_others_were_indexed(tmp_path: Path) -> None:
    for name in "abcd":
        write_tar(tmp_path / f"{name}.tar", (f"{name}.jpg", b"1"))
    for name in "bc":
        whole = (tmp_path / f"{name}.tar").read_bytes()
        (tmp_path / f"{name}.tar").write_bytes(whole[:1024])
    with pytest.raises(DamagedTar, match=r"b.tar is damaged at byte 1024: .*1 more tars are damaged"):
        index([f"{tmp_path}/*.tar"])
    assert len(load_index(tmp_path / "a.tar")) == len(load_index(tmp_path / "d.tar")) == 1
    assert [shard["name"] for shard in (shard_manifest.read(tmp_path) or {})["shards"]] == ["a.tar", "d.tar"]


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz"):
        pass
    with pytest.raises(UserError, match="compressed"):
        index([f"{tmp_path}/a.tar"])


def test_a_manifest_of_others_is_left_alone(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", ("a.jpg", b"1"))
    (tmp_path / "manifest.json").write_text('{"theirs": 1}')
    index([str(tar)])
    assert (tmp_path / "manifest.json").read_text() == '{"theirs": 1}'
    assert len(load_index(tar)) == 1


def test_processes_give_the_same(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", ("a.jpg", bytes(number)), ("b.jpg", b"2"))
    one = index([f"{tmp_path}/*.tar"])
    stored = {path.name: path.read_bytes() for path in tmp_path.glob("*.npz")}
    for path in tmp_path.glob("*.npz"):
        path.unlink()
    two = index([f"{tmp_path}/*.tar"], workers=2)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.npz")} == stored
    assert [shard.digest for shard in one.shards] == [shard.digest for shard in two.shards]


@pytest.mark.parametrize(("split", "count"), [("train", 40), ("val", 20)])
def test_the_sample_in_the_repository_is_whole(split: str, count: int) -> None:
    tars = sorted((SAMPLE / split).glob("*.tar"))
    for tar in tars:
        made, kept = index_tar(tar)[0], load_index(tar)
        assert (made.digest, made.labels.tolist()) == (kept.digest, kept.labels.tolist())
        assert made.offsets.tolist() == kept.offsets.tolist()
        assert re.fullmatch(rf"{split}-\d{{6}}.tar", tar.name)
    assert sum(len(load_index(tar)) for tar in tars) == count
    total = sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file())
    assert total < 1_000_000
