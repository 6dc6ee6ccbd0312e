import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from seer import shard_manifest
from seer.errors import UserError
from seer.shard_index import load_index
from seer.shard_list import ShardList
from seer.shards.pack import Packed, pack

FILES = {
    "cat/a.jpg": b"first" * 300,
    "cat/www.a.com_1.JPG": b"second" * 200,
    "cat/www.a.com_2.jpg": b"third",
    "dog/deep/er/b.jpeg": b"x" * 5000,
    "dog/c.PNG": b"y" * 512,
    "dog/ünï code [1].webp": b"z" * 513,
    "eel/d.tif": b"tif",
    "eel/e.gif": b"gif",
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "photos"


def samples(out: Path) -> list[dict[str, bytes]]:
    """All samples of a folder as tarfile reads them: suffix -> bytes, with the key under `key`."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, suffix = member.name.split(".", 1)
                content = tar.extractfile(member)
                assert content is not None and suffix not in found.get(key, {})
                found.setdefault(key, {"key": key.encode()})[suffix] = content.read()
    return list(found.values())


def image_of(sample: dict[str, bytes]) -> bytes:
    (image,) = (content for suffix, content in sample.items() if suffix not in ("key", "json", "cls"))
    return image


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_every_file_is_there_byte_for_byte_with_its_path(photos: Path, tmp_path: Path) -> None:
    packed = pack(photos, tmp_path / "out", workers=1)
    found = samples(tmp_path / "out")
    assert {json.loads(sample["json"])["path"]: image_of(sample) for sample in found} == FILES
    assert [sample["key"] for sample in found] == [b"%09d" % number for number in range(len(FILES))]
    assert not any("cls" in sample for sample in found)
    assert packed == Packed(tmp_path / "out", 8, packed.bytes, 1, 0, [], {}, {}, False)


def test_the_index_leads_to_the_images(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(photos, out, labels="folders", samples_per_shard=3, workers=1)
    shards = ShardList.open([f"{out}/*.tar"])
    assert shards.counts.tolist() == [3, 3, 2]
    seen = []
    for shard in shards:
        data = Path(shard.location).read_bytes()
        assert shard.tar_size == len(data)
        for offset, size, label in zip(shard.offsets, shard.sizes, shard.labels, strict=True):
            seen.append((data[int(offset) : int(offset) + int(size)], int(label)))
    names = ["cat", "dog", "eel"]
    assert sorted(seen) == sorted((content, names.index(path.split("/")[0])) for path, content in FILES.items())
    assert shard_manifest.class_names(out) == names


def test_labels_agree_with_the_members(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out", labels="folders", workers=1)
    for sample in samples(tmp_path / "out"):
        folder = json.loads(sample["json"])["path"].split("/")[0]
        assert ["cat", "dog", "eel"][int(sample["cls"])] == folder


def test_classes_can_be_those_of_another_pack(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "train", labels="folders", workers=1)
    for name in ("cat", "eel"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "a.jpg").write_bytes(b"image")
    classes = shard_manifest.class_names(tmp_path / "train")
    pack(tmp_path / "val", tmp_path / "out", labels="folders", classes=classes, workers=1)
    assert sorted(ShardList.open([f"{tmp_path}/out/*.tar"])[0].labels) == [0, 2]
    (tmp_path / "val" / "dgo").mkdir()
    (tmp_path / "val" / "dgo" / "a.jpg").write_bytes(b"image")
    with pytest.raises(UserError, match=r"dgo is no class of the given list: .* did you mean 'dog'"):
        pack(tmp_path / "val", tmp_path / "out2", labels="folders", classes=classes, workers=1)
    with pytest.raises(UserError, match="tells no class names"):
        shard_manifest.class_names(tmp_path / "val")


def test_with_labels_every_image_lies_in_a_class_folder(photos: Path, tmp_path: Path) -> None:
    (photos / "loose.jpg").write_bytes(b"image")
    with pytest.raises(UserError, match=r"loose.jpg lies in no class folder"):
        pack(photos, tmp_path / "out", labels="folders", workers=1)
    assert not (tmp_path / "out").exists()


def test_the_bytes_depend_on_input_options_and_seed_alone(photos: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name / "out" for name in "abc")
    pack(photos, first, samples_per_shard=3, workers=1)
    pack(photos, second, samples_per_shard=3, workers=2)
    assert contents(first) == contents(second)
    pack(photos, third, samples_per_shard=3, workers=1, seed=1)
    assert contents(first).keys() == contents(third).keys()
    assert contents(first)["out-000000.tar"] != contents(third)["out-000000.tar"]


def test_the_bytes_are_those_of_webdatasets_writer(photos: Path, tmp_path: Path) -> None:
    from webdataset import TarWriter

    pack(photos, tmp_path / "out", labels="folders", workers=1)
    with TarWriter(str(tmp_path / "theirs.tar"), user="", group="", mtime=0, encoder=False) as writer:
        for sample in samples(tmp_path / "out"):
            key = sample.pop("key").decode()
            writer.write({"__key__": key, **sample})
    assert (tmp_path / "theirs.tar").read_bytes() == (tmp_path / "out" / "out-000000.tar").read_bytes()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_webdataset_and_tar_read_the_shards(photos: Path, tmp_path: Path) -> None:
    import webdataset

    out = tmp_path / "out"
    pack(photos, out, labels="folders", samples_per_shard=3, workers=1)
    urls = [str(path) for path in sorted(out.glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    gc.collect()  # its warning belongs to this test
    assert len(found) == len(FILES)
    for sample in found:
        path = json.loads(sample["json"])["path"]
        assert sample[path.rsplit(".", 1)[1].lower()] == FILES[path]
    listed = [subprocess.run(["tar", "tf", url], capture_output=True, text=True, check=True).stdout for url in urls]
    assert sum(listing.count("\n") for listing in listed) == 3 * len(FILES)


def test_shards_are_mixtures_of_about_the_size_that_was_asked_for(tmp_path: Path) -> None:
    for number in range(300):
        folder = tmp_path / "photos" / f"class{number // 100}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(bytes(100 + 7 * number))
    pack(tmp_path / "photos", tmp_path / "out", labels="folders", shard_bytes=100_000, workers=1)
    shards = ShardList.open([f"{tmp_path}/out/*.tar"])
    assert len(shards) > 5
    for shard in shards:
        assert shard.tar_size <= 100_000 + 8192 + 10240  # one image more, and tar's padding to 20 blocks
        assert set(shard.labels) == {0, 1, 2}
    assert shards.counts.min() > 0.5 * shards.counts.max()


def test_the_same_pack_again_does_nothing(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = pack(photos, out, workers=1)
    stamps = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = pack(photos, out, workers=1)
    assert again.already_there and (again.samples, again.bytes, again.shards) == (8, first.bytes, 1)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    photos.rename(tmp_path / "moved")
    assert pack(tmp_path / "moved", out, workers=1).already_there
    out.rename(tmp_path / "renamed")
    assert pack(tmp_path / "moved", tmp_path / "renamed", workers=1).already_there


def test_another_pack_is_replaced_only_if_asked(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(photos, out, samples_per_shard=2, workers=1)
    (out / "notes.txt").write_text("mine")
    (out / "other-000000.tar").write_text("mine too")
    before = contents(out)
    (photos / "cat" / "new.jpg").write_bytes(b"new")
    with pytest.raises(UserError, match=r"holds a pack of other images or options: .* add --overwrite"):
        pack(photos, out, samples_per_shard=2, workers=1)
    assert contents(out) == before
    packed = pack(photos, out, samples_per_shard=9, workers=1, overwrite=True)
    assert (packed.samples, packed.shards) == (9, 1)
    assert sorted(contents(out)) == [
        "manifest.json", "notes.txt", "other-000000.tar", "out-000000.tar", "out-000000.tar.seer.npz",
    ]  # fmt: skip


def test_a_damaged_pack_is_told_and_mended_by_overwrite(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(photos, out, workers=1)
    whole = contents(out)
    (out / "out-000000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="holds a damaged pack"):
        pack(photos, out, workers=1)
    pack(photos, out, workers=1, overwrite=True)
    assert contents(out) == whole


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_others_is_never_touched(photos: Path, tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "out-000000.tar").write_bytes(b"somebody's")
    (out / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is not empty"):
        pack(photos, out, workers=1, overwrite=overwrite)
    assert contents(out) == {"out-000000.tar": b"somebody's", "manifest.json": b"{}"}


KILLED = """
import sys, time
from pathlib import Path
from seer.shards import pack as module
read = module.bytes_of
def slowly(images, row):
    time.sleep(0.05)
    return read(images, row)
module.bytes_of = slowly
module.pack(Path(sys.argv[1]), Path(sys.argv[2]), samples_per_shard=2, workers=1)
"""


def test_a_kill_leaves_whole_shards_and_the_next_call_goes_on(photos: Path, tmp_path: Path) -> None:
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed" / "out"
    pack(photos, undisturbed, samples_per_shard=2, workers=1)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(photos), str(out)], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not (list(out.glob("*.tar")) and list(out.glob(".*.tar.*.part"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = sorted(out.glob("*.tar"))
    assert 1 <= len(done) < 4 and not (out / "manifest.json").exists()
    for tar in done:
        assert tar.read_bytes() == (undisturbed / tar.name).read_bytes()
        load_index(tar)
    stamps = {tar: tar.stat().st_mtime_ns for tar in done}
    pack(photos, out, samples_per_shard=2, workers=1)
    assert contents(out) == contents(undisturbed)  # and nothing temporary is left
    assert {tar: tar.stat().st_mtime_ns for tar in done} == stamps


def test_a_rest_of_other_options_is_not_continued(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(photos, out, samples_per_shard=2, workers=1)
    options = json.loads((out / "manifest.json").read_bytes())
    (out / ".packing.json").write_text(json.dumps(options))
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match="add --overwrite"):
        pack(photos, out, samples_per_shard=3, workers=1)
    assert pack(photos, out, samples_per_shard=3, workers=1, overwrite=True).shards == 3
    assert len(list(out.glob("*.tar"))) == 3


def test_a_write_that_fails_leaves_nothing_half_written(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(stream: io.BufferedWriter, shard: object) -> None:
        stream.write(bytes(10_000))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seer.shards.pack._write_tar", full)
    with pytest.raises(UserError, match=r"cannot be written .*No space left"):
        pack(photos, tmp_path / "out", workers=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".packing.json"]


def test_an_output_that_cannot_be_made_is_named(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/nothing/out")):
        with pytest.raises(UserError, match=re.escape(str(out))):
            pack(photos, out, workers=1)


def test_an_input_that_changes_is_told(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seer.shards import inputs

    real = inputs._file
    monkeypatch.setattr(inputs, "_file", lambda path: real(path) + b"more")
    with pytest.raises(UserError, match="changed while it was packed"):
        pack(photos, tmp_path / "out", workers=1)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_what_is_no_image_is_left_out_and_counted(photos: Path, tmp_path: Path) -> None:
    (photos / "cat" / "notes.txt").write_text("text")
    (photos / "cat" / "README").write_text("text")
    (photos / "cat" / ".hidden.jpg").write_text("image")
    (photos / ".thumbnails").mkdir()
    (photos / "cat" / "empty.jpg").write_bytes(b"")
    os.symlink("nowhere.jpg", photos / "cat" / "dangling.jpg")
    os.symlink("itself.jpg", photos / "cat" / "itself.jpg")
    os.mkfifo(photos / "cat" / "pipe.jpg")
    packed = pack(photos, tmp_path / "out", workers=1)
    assert packed.samples == len(FILES)
    assert packed.left_out == {
        "hidden": 2, "links to nothing": 2, "files .txt": 1, "files without extension": 1, "empty files": 1,
        "pipes and devices": 1,
    }  # fmt: skip


def test_links_are_followed_and_loops_end(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "f.jpg").write_bytes(b"far")
    os.symlink(tmp_path / "elsewhere", photos / "far")
    os.symlink(tmp_path / "elsewhere" / "f.jpg", photos / "cat" / "link.jpg")
    os.symlink(photos, photos / "cat" / "loop")
    os.symlink(photos / "dog", photos / "aaa")  # sorts before the real folder, yet dog/ keeps its name
    packed = pack(photos, tmp_path / "out", workers=1)
    paths = {json.loads(sample["json"])["path"] for sample in samples(tmp_path / "out")}
    assert paths == {*FILES, "far/f.jpg", "cat/link.jpg"}
    assert packed.left_out == {"folders met a second time": 2}


def test_names_that_are_no_utf8(photos: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    (photos / "cat" / name).write_bytes(b"latin")
    pack(photos, tmp_path / "out", workers=1)
    paths = {json.loads(sample["json"])["path"]: image_of(sample) for sample in samples(tmp_path / "out")}
    assert paths[f"cat/{name}"] == b"latin"


def test_an_output_inside_the_input_is_not_packed(photos: Path, tmp_path: Path) -> None:
    packed = pack(photos, photos / "shards", workers=1)
    assert packed.samples == len(FILES) and packed.left_out == {}
    assert pack(photos, photos / "shards", workers=1).already_there


@pytest.mark.parametrize("name", ["2024_01", "a=b c", "{x}[1]*", "ünï"])
def test_an_output_of_any_name_gives_plain_file_names(photos: Path, tmp_path: Path, name: str) -> None:
    pack(photos, tmp_path / name, workers=1)
    (tar,) = (tmp_path / name).glob("*.tar")
    assert re.fullmatch(r"[A-Za-z0-9_-]+-000000\.tar", tar.name)
    assert ShardList.open([f"{tmp_path}/{name}/*.tar"]).samples == len(FILES)


def test_an_input_without_images_is_told(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=r"holds no image .it is empty."):
        pack(tmp_path / "photos", tmp_path / "out", workers=1)
    (tmp_path / "photos" / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"holds no image .1 files \.txt."):
        pack(tmp_path / "photos", tmp_path / "out", workers=1)
    with pytest.raises(UserError, match=r"cannot be read .No such file"):
        pack(tmp_path / "nothing", tmp_path / "out", workers=1)
    with pytest.raises(UserError, match="is a file"):
        pack(tmp_path / "photos" / "a.txt", tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_progress_ends_at_the_whole(photos: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    pack(photos, tmp_path / "out", samples_per_shard=3, workers=1, progress=lambda *figures: told.append(figures))
    total = sum(map(len, FILES.values()))
    assert len(told) == 3 and told[-1] == (total, total)
    assert np.all(np.diff([done for done, _ in told]) > 0)


def test_two_packs_in_one_folder(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen: list[str] = []

    def second(done: int, total: int) -> None:
        for overwrite in (False, True):
            with pytest.raises(
                UserError, match=r"is being written by another pack .*: one pack at a time writes"
            ) as told:
                pack(photos / "dog", out, workers=1, seed=1, overwrite=overwrite)
            seen.append(str(told.value))

    first = pack(photos, out, samples_per_shard=3, workers=1, progress=second)
    assert seen and len(samples(out)) == first.samples == len(FILES)
    assert pack(photos, out, samples_per_shard=3, workers=1).already_there  # the lock is gone


def test_a_label_of_five_thousand_digits_is_a_word(photos: Path, tmp_path: Path) -> None:
    lines = [f"{photos / 'dog' / 'c.PNG'},{'1' * 5000}", f"{photos / 'cat' / 'a.jpg'},7"]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines]))
    assert pack(tmp_path / "list.csv", tmp_path / "out", workers=1).classes == ["1" * 5000, "7"]


@pytest.mark.parametrize("content", ["[]", "{}", '{"name": 5}', "[" * 200_000])
def test_somebody_elses_notes_of_a_pack(photos: Path, tmp_path: Path, content: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".packing.json").write_text(content)
    with pytest.raises(UserError, match="is not empty"):
        pack(photos, out, workers=1, overwrite=True)
    assert os.listdir(out) == [".packing.json"]
