"""Everything that pack takes besides one folder: it gives what the same images in one folder would give."""

import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from image_inputs import FILES, JPEG, PNG, folder, listed, packed_samples, tar, tars_of, zipped

from seer.cli.shards import run
from seer.errors import UserError
from seer.shard_list import ShardList
from seer.shards.listing import list_images
from seer.shards.pack import pack


def test_a_zip_gives_the_shards_of_its_folder(tmp_path: Path) -> None:
    pack(folder(tmp_path / "photos"), tmp_path / "a" / "out", labels="folders", samples_per_shard=7, workers=1)
    for number, method in enumerate((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED)):
        archive = zipped(tmp_path / f"{number}.zip", FILES, method)
        out = tmp_path / str(number) / "out"
        pack(archive, out, labels="folders", samples_per_shard=7, workers=1)
        found, expected = packed_samples(out), packed_samples(tmp_path / "a" / "out")
        assert [(path.removeprefix(f"{number}.zip/"), *rest) for path, *rest in found] == [tuple(s) for s in expected]


def test_a_list_gives_the_shards_of_its_folder(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos")
    pack(photos, tmp_path / "a" / "out", labels="folders", samples_per_shard=7, workers=1)
    rows = [{"path": name, "label": name.split("/")[0]} for name in FILES]
    pack(listed(photos / "list.csv", rows), tmp_path / "b" / "out", samples_per_shard=7, workers=1)
    assert tars_of(tmp_path / "a" / "out") == tars_of(tmp_path / "b" / "out")
    rows = [{"size": "7", "path": str(photos / name)} for name in FILES]
    packed = pack(listed(tmp_path / "elsewhere" / "list.csv", rows), tmp_path / "c" / "out", workers=1)
    assert packed.labelled == 0 and len(packed_samples(tmp_path / "c" / "out")) == len(FILES)


def test_a_list_may_be_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    photos = folder(tmp_path / "photos")
    rows = [{"path": name, "label": name.split("/")[0]} for name in FILES]
    pack(listed(photos / "list.csv", rows), tmp_path / "a" / "out", workers=1)
    write_table(pyarrow.Table.from_pylist(rows), photos / "list.parquet")
    pack(photos / "list.parquet", tmp_path / "b" / "out", workers=1)
    assert tars_of(tmp_path / "a" / "out") == tars_of(tmp_path / "b" / "out")
    numbered = [{"path": name, "label": place % 5} for place, name in enumerate(FILES)]
    write_table(pyarrow.Table.from_pylist(numbered), photos / "list.parquet")
    pack(photos / "list.parquet", tmp_path / "c" / "out", workers=1)
    assert {path: label for path, _, label, _ in packed_samples(tmp_path / "c" / "out")} == {
        row["path"]: row["label"] for row in numbered
    }
    write_table(pyarrow.Table.from_pylist([{"file": "x"}]), photos / "list.parquet")
    with pytest.raises(UserError, match="has no column path"):
        pack(photos / "list.parquet", tmp_path / "d", workers=1)
    (photos / "list.parquet").write_bytes(b"text")
    with pytest.raises(UserError, match="is no Parquet"):
        pack(photos / "list.parquet", tmp_path / "d", workers=1)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "list.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"needs pyarrow: .* pip install 'seer\[parquet\]'"):
        pack(tmp_path / "list.parquet", tmp_path / "out", workers=1)


def test_what_a_list_names_in_vain_is_counted(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos", {"a.jpg": JPEG, "b3f5": PNG, "c.txt": b"text", "d.jpg": b""})
    names = ["a.jpg", "a.jpg", "b3f5", "c.txt", "d.jpg", "gone.jpg", "", "."]
    packed = pack(listed(photos / "list.csv", [{"path": name} for name in names]), tmp_path / "out", workers=1)
    assert packed.left_out == {
        "paths listed twice": 1, "listed but no image": 1, "empty files": 1, "listed but not there": 1,
        "folders, pipes and devices": 1, "rows without path": 1,
    }  # fmt: skip
    assert sorted(packed_samples(tmp_path / "out")) == [("a.jpg", JPEG, -1, "jpg"), ("b3f5", PNG, -1, "png")]


@pytest.mark.parametrize("text", ["file,label\na.jpg,1\n", "", "paths\na.jpg\n"])
def test_a_list_without_paths_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match="has no column path"):
        pack(tmp_path / "list.csv", tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_the_columns_of_a_list_are_told_once(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("file,label\na.jpg,1\n")
    with pytest.raises(UserError, match=r"its columns: file, label\); name the column of the files path$"):
        pack(tmp_path / "list.csv", tmp_path / "out", workers=1)


@pytest.mark.parametrize(("columns", "tars"), [("url,key,status,width", ()), ("url,caption", ("00000.tar",))])
def test_a_list_of_img2dataset_is_known(tmp_path: Path, columns: str, tars: tuple[str, ...]) -> None:
    (tmp_path / "laion").mkdir()
    for name in ("list.csv", *tars):
        (tmp_path / "laion" / name).write_text(f"{columns}\n")
    with pytest.raises(UserError, match=f"; this is img2dataset's list: pack its folder, {tmp_path}/laion$") as caught:
        pack(tmp_path / "laion" / "list.csv", tmp_path / "out", workers=1)
    assert str(caught.value).count(columns.replace(",", ", ")) == 1


def test_an_empty_tar_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.tar is damaged at byte 0: the file is empty; "):
        pack(tmp_path / "a.tar", tmp_path / "out", workers=1)


def test_lists_of_spreadsheets(tmp_path: Path) -> None:
    folder(tmp_path, {"a b,c.jpg": JPEG})
    (tmp_path / "list.csv").write_bytes('\ufeffpath,label\r\n"a b,c.jpg", ünï \r\n'.encode())
    packed = pack(tmp_path / "list.csv", tmp_path / "out", workers=1)
    assert packed.classes == ["ünï"] and packed_samples(tmp_path / "out") == [("a b,c.jpg", JPEG, 0, "jpg")]


def test_a_repacked_pack_is_the_same_pack(tmp_path: Path) -> None:
    photos, first = folder(tmp_path / "photos"), tmp_path / "a" / "out"
    pack(photos, first, labels="folders", samples_per_shard=7, workers=1)
    for name, inputs in {"folder": first, "pattern": first / "*.tar"}.items():
        packed = pack(inputs, tmp_path / name / "out", samples_per_shard=7, workers=2)
        assert tars_of(tmp_path / name / "out") == tars_of(first)
        assert packed.classes == ["cat", "dog", "eel"] and packed.labelled == len(FILES)
    pack(first, tmp_path / "b" / "out", samples_per_shard=7, labels="folders", workers=1)
    assert tars_of(tmp_path / "b" / "out") == tars_of(first)
    assert pack(first, tmp_path / "c" / "out", labels="none", workers=1).labelled == 0


def test_webdataset_tars_keep_labels_and_notes(tmp_path: Path) -> None:
    webdataset = {
        "000/1.jpg": JPEG, "000/1.cls": b"3\n", "000/1.json": b'{"url": "http://a", "label": 9}',
        "000/2.cls": b"cat", "000/2.mask.png": PNG + b"mask", "000/2.png": PNG,
        "000/3.json": b'{"label": 0, "caption": "\xc3\xbc"}', "000/3.txt": b"caption", "000/3.img": JPEG + b"3",
        "000/4.json": b"[broken", "000/4.webp": JPEG + b"4",
        "000/5.jpg": b"<html>", "000/6.txt": b"text", "000/7.jpg": b"", "000/.hidden.jpg": JPEG,
        "a.b.1.jpg": JPEG + b"b1", "a.b.2.jpg": JPEG + b"b2", "bare": PNG + b"bare",
    }  # fmt: skip
    packed = pack(tar(tmp_path / "in" / "x.tar", webdataset), tmp_path / "out", workers=1)
    assert sorted(packed_samples(tmp_path / "out")) == [
        ("x.tar/000/1.jpg", JPEG, 3, "jpg"),
        ("x.tar/000/2.png", PNG, -1, "png"),
        ("x.tar/000/3.img", JPEG + b"3", 0, "jpg"),
        ("x.tar/000/4.webp", JPEG + b"4", -1, "jpg"),
        ("x.tar/a.b.1.jpg", JPEG + b"b1", -1, "jpg"),
        ("x.tar/a.b.2.jpg", JPEG + b"b2", -1, "jpg"),
        ("x.tar/bare", PNG + b"bare", -1, "png"),
    ]
    assert packed.left_out == {
        "members named as images that are none": 1, "empty files": 1, "hidden": 1, "further images of a sample": 1,
        "labels that are no class number": 1,
    }  # fmt: skip
    assert packed.labelled == 2 and packed.classes == []
    with tarfile.open(next((tmp_path / "out").glob("*.tar"))) as archive:
        notes = [json.load(archive.extractfile(m)) for m in archive if m.name.endswith("json")]  # type: ignore[arg-type]
    assert {"url": "http://a", "label": 9, "path": "x.tar/000/1.jpg"} in notes
    assert {"label": 0, "caption": "ü", "path": "x.tar/000/3.img"} in notes


def test_the_output_of_img2dataset(tmp_path: Path) -> None:
    place = tmp_path / "laion"
    for shard in range(3):
        files: dict[str, bytes] = {}
        for image in range(4):
            key = f"{shard:05d}{image:04d}"
            note = json.dumps({"url": f"http://x/{key}", "key": key, "status": "success"}).encode()
            files |= {f"{key}.jpg": JPEG + key.encode(), f"{key}.json": note, f"{key}.txt": b"a caption"}
        tar(place / f"{shard:05d}.tar", files)
        (place / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (place / f"{shard:05d}_stats.json").write_text("{}")
    packed = pack(place, tmp_path / "out", samples_per_shard=5, workers=2)
    assert (packed.samples, packed.shards, packed.left_out) == (12, 3, {})
    assert {path for path, *_ in packed_samples(tmp_path / "out")} == {
        f"{shard:05d}.tar/{shard:05d}{image:04d}.jpg" for shard in range(3) for image in range(4)
    }
    with pytest.raises(UserError, match=r"photos holds no image"):
        (tmp_path / "photos").mkdir()
        pack(tmp_path / "photos", tmp_path / "other", workers=1)


def test_several_inputs_are_mixed_and_told_apart(tmp_path: Path) -> None:
    halves = [dict(list(FILES.items())[half::2]) for half in (0, 1)]
    first, second = folder(tmp_path / "a" / "photos", halves[0]), folder(tmp_path / "b" / "photos", halves[1])
    more = zipped(tmp_path / "more.zip", {"cat/zip.jpg": JPEG + b"zip"})
    theirs = tar(tmp_path / "theirs.tar", {"dog/1.jpg": JPEG + b"tar"})
    inputs = [first, second, more, theirs, first, first / "cat"]
    packed = pack(inputs, tmp_path / "out", labels="folders", samples_per_shard=9, workers=1)
    found = packed_samples(tmp_path / "out")
    assert packed.left_out == {"folders met a second time": 1} and packed.classes == ["cat", "dog", "eel"]
    expected = {f"a/photos/{name}": data for name, data in halves[0].items()}
    expected |= {f"b/photos/{name}": data for name, data in halves[1].items()}
    expected |= {"more.zip/cat/zip.jpg": JPEG + b"zip", "theirs.tar/dog/1.jpg": JPEG + b"tar"}
    assert {path: image for path, image, *_ in found} == expected
    for path, _, label, _ in found:
        assert packed.classes[label] in path
    pack(inputs[:4][::-1], tmp_path / "again" / "out", labels="folders", samples_per_shard=9, workers=2)
    assert tars_of(tmp_path / "again" / "out") == tars_of(tmp_path / "out")


def test_equal_paths_from_several_packs_are_all_kept_in_one_order(tmp_path: Path) -> None:
    packs = []
    for name in ("b", "a"):
        packs.append(tmp_path / name)
        pack(folder(tmp_path / "photos" / name, {"x.jpg": JPEG + name.encode(), "y.jpg": JPEG}), packs[-1], workers=1)
    pack(packs, tmp_path / "1" / "out", workers=1)
    pack(packs[::-1], tmp_path / "2" / "out", workers=1)
    assert tars_of(tmp_path / "1" / "out") == tars_of(tmp_path / "2" / "out")
    images = sorted(image for _, image, *_ in packed_samples(tmp_path / "1" / "out"))
    assert images == [JPEG, JPEG, JPEG + b"a", JPEG + b"b"]


def test_numbered_labels_keep_their_numbers(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos")
    rows = [{"path": name, "label": str(place % 3 + 4) if place % 2 else ""} for place, name in enumerate(FILES)]
    packed = pack(listed(photos / "list.csv", rows), tmp_path / "out", workers=1)
    assert packed.labelled == len(FILES) // 2 and packed.classes == []
    wanted = {row["path"]: int(row["label"] or -1) for row in rows}
    assert {path: label for path, _, label, _ in packed_samples(tmp_path / "out")} == wanted
    index = ShardList.open([f"{tmp_path}/out/*.tar"])[0]
    assert sorted(index.labels.tolist()) == sorted(wanted.values())
    with pytest.raises(UserError, match="label 6 has no name"):
        pack(photos / "list.csv", tmp_path / "named", classes=["a", "b"], workers=1)
    assert pack(photos / "list.csv", tmp_path / "named", classes=list("abcdefg"), workers=1).classes == list("abcdefg")


def test_zips_of_strangers(tmp_path: Path) -> None:
    files = {"__MACOSX/._a.jpg": JPEG, "x/.b.jpg": JPEG, "../../evil.jpg": JPEG, "notes.txt": b"", "e.jpg": b""}
    packed = pack(zipped(tmp_path / "x.zip", files | {"ok.jpg": JPEG}), tmp_path / "out", workers=1)
    assert packed.left_out == {"hidden": 3, "files .txt": 1, "empty files": 1}
    archive = zipped(tmp_path / "y.zip", {"a.jpg": JPEG * 1000, "b.jpg": JPEG}, zipfile.ZIP_BZIP2)
    with pytest.raises(UserError, match="2 compressed by a method other than deflate"):
        pack(archive, tmp_path / "other", workers=1)
    bomb = zipped(tmp_path / "w.zip", {"a.bmp": b"BM" + bytes(70_000_000)})
    with pytest.raises(UserError, match="a zip bomb"):
        pack(bomb, tmp_path / "other", workers=1)
    (tmp_path / "z.zip").write_bytes(b"text")
    with pytest.raises(UserError, match=r"z\.zip is no zip"):
        pack(tmp_path / "z.zip", tmp_path / "other", workers=1)


def test_a_zip_that_was_altered_is_told(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "x.zip", {"a.jpg": bytes(JPEG) + bytes(range(256)) * 3})
    whole = archive.read_bytes()
    with zipfile.ZipFile(archive) as opened:
        entry = opened.getinfo("a.jpg")
    for at in range(30 + len("a.jpg"), 30 + len("a.jpg") + entry.compress_size, 29):
        data = bytearray(whole)
        data[entry.header_offset + at] ^= 1
        archive.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.jpg in .*x\.zip (cannot be read|is damaged)"):
            pack(archive, tmp_path / str(at), workers=1)
        assert not list((tmp_path / str(at)).glob("*.tar"))


def test_a_tar_that_was_cut_is_told(tmp_path: Path) -> None:
    archive = tar(tmp_path / "x.tar", FILES)
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"x\.tar is damaged at byte"):
        pack(archive, tmp_path / "out", workers=1)


def test_a_file_of_another_kind_is_told(tmp_path: Path) -> None:
    folder(tmp_path, {"a.jpg": JPEG, "b.tar.gz": b"x"})
    for name in ("a.jpg", "b.tar.gz"):
        with pytest.raises(UserError, match=r"is a file: pack takes folders, tars, zips, and lists"):
            pack(tmp_path / name, tmp_path / "out", workers=1)


def test_the_same_inputs_again_do_nothing_and_others_are_noticed(tmp_path: Path) -> None:
    archive = tar(tmp_path / "x.tar", {"a.jpg": JPEG, "b.jpg": PNG})
    out = tmp_path / "out"
    pack(archive, out, workers=1)
    assert pack(archive, out, workers=1).already_there
    tar(archive, {"a.jpg": JPEG, "b.jpg": PNG + b"more"})
    with pytest.raises(UserError, match="holds a pack of other images or options"):
        pack(archive, out, workers=1)


def test_the_command_takes_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path / "photos", {"a.jpg": JPEG})
    zipped(tmp_path / "x.zip", {"b.jpg": JPEG})
    words = ["pack", str(tmp_path / "photos"), str(tmp_path / "x.zip"), "--out", str(tmp_path / "out")]
    assert run([*words, "--workers", "1"]) == 0
    assert "2 images in 1 shard, 10.2 kB, no labels" in capsys.readouterr().out


def test_files_come_in_the_order_of_their_paths_whatever_the_disk_says(tmp_path: Path) -> None:
    names = [f"{(number * 7919) % 1000:03d}{'/x' if number % 3 else ''}.jpg" for number in range(300)]
    listing = list_images([folder(tmp_path, dict.fromkeys(names, JPEG))], tmp_path / "out")
    assert listing.paths == sorted(names) and np.all(listing.sizes == len(JPEG))


@pytest.mark.slow
def test_listing_a_full_folder_takes_linear_time_and_little_memory(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from seer.shards.listing import list_images\n"
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "before, start = peak(), time.process_time()\n"
        "n = len(list_images([Path(sys.argv[1])], Path('/nowhere')))\n"
        "print(n, time.process_time() - start, peak() - before)\n"
    )
    figures = []
    for count in (5_000, 50_000):
        place = tmp_path / str(count)
        place.mkdir()
        for number in range(count):
            os.close(os.open(place / f"photo-of-a-usual-length-{number:07d}.jpg", os.O_CREAT | os.O_WRONLY))
            os.truncate(place / f"photo-of-a-usual-length-{number:07d}.jpg", 1)
        start = time.monotonic()
        words = [sys.executable, "-c", program, str(place)]
        output = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
        files, seconds, kilobytes = map(float, output.split())
        assert files == count
        figures.append((seconds, kilobytes * 1024))
        print(f"{count}: {seconds:.2f} s CPU, {kilobytes / count * 1024:.0f} bytes an image")
        assert time.monotonic() - start < 60
    assert figures[1][0] < 20 * figures[0][0]
    assert figures[1][1] < 1000 * 50_000  # a million: under 1 GB
