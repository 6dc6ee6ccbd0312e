import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_inputs import tar
from PIL import Image

from seer.cli.shards import run
from seer.data.decode import open_image
from seer.errors import UserError
from seer.shard_index import load_index
from seer.shards.formats import extension_of
from seer.shards.index import index
from seer.shards.pack import pack
from seer.shards.sheet import contact_sheet
from seer.shards.stats import Picked, Shards, stats

CLASSES = ("ant", "bee", "cow")
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


def encoded(width: int, height: int, kind: str = "JPEG", colour: int = 100) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (colour, 50, 200)).save(buffer, kind)
    return buffer.getvalue()


def contents(path: Path) -> list[bytes]:
    data, index = path.read_bytes(), load_index(path)
    return [data[at : at + size] for at, size in zip(index.offsets.tolist(), index.sizes.tolist(), strict=True)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three classes of 10, 20 and 30 images, class c with widths 10 c + 10; in each, one page and one that was cut."""
    for number, name in enumerate(CLASSES):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for image in range(10 * (number + 1)):
            data = encoded(10 * number + 10, 40, "PNG" if image % 2 else "JPEG")
            (folder / f"{image}.jpg").write_bytes({0: b"<html>", 2: data[:-4]}.get(image, data))
    pack(tmp_path / "photos", tmp_path / "out", labels="folders", samples_per_shard=7, workers=1)
    return tmp_path / "out"


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_told_by_content(kind: str) -> None:
    data = encoded(8, 8, kind)
    assert extension_of(data[:16]) == FORMATS[kind]
    assert extension_of(data[1:17]) is None and extension_of(b"") is None and extension_of(b"BMW is a car.....") is None


@pytest.mark.parametrize("workers", [1, 2])
def test_all_images_are_counted(shards: Path, workers: int) -> None:
    found = stats(Shards([f"{shards}/*.tar"]), open_image, max_images=None, workers=workers)
    assert (found.images, found.sampled, found.shards, found.unlabelled) == (60, 60, 9, 0)
    assert dict(zip(found.classes, found.labels.values(), strict=True)) == {"ant": 10, "bee": 20, "cow": 30}
    assert found.bad == {"not_an_image": 3, "truncated": 3}
    assert found.formats == {"png": 30, "jpg": 27, "other": 3}
    assert np.unique(found.widths, return_counts=True)[1].tolist() == [8, 18, 28] and set(found.heights) == {40}
    assert found.quantiles()["width"] == [10, 10, 20, 30, 30, 30, 30]  # 54 images: the middle one is the 27th
    assert found.common_sizes(2) == [(30, 40, 28), (20, 40, 18)]
    assert found.tar_bytes == sum(tar.stat().st_size for tar in shards.glob("*.tar"))


def test_a_sample_is_evenly_spread(tmp_path: Path) -> None:
    for shard in range(3):
        files = {f"{shard}-{width:02d}.png": encoded(width, 1, "PNG") for width in range(1 + 4 * shard, 5 + 4 * shard)}
        tar(tmp_path / f"{shard}.tar", files)
    index([f"{tmp_path}/*.tar"])
    for count, widths in {
        1: [7],
        3: [3, 7, 11],
        4: [2, 5, 8, 11],
        12: list(range(1, 13)),
        99: list(range(1, 13)),
    }.items():
        found = stats(Shards([f"{tmp_path}/*.tar"]), open_image, max_images=count)
        assert found.widths.tolist() == widths and found.sampled == len(widths) and found.images == 12


def test_a_fault_that_is_not_the_images_is_raised(shards: Path) -> None:
    def broken(data: bytes) -> Image.Image:
        raise AttributeError("a bug")

    with pytest.raises(AttributeError):
        stats(Shards([f"{shards}/*.tar"]), broken)  # type: ignore[arg-type]


def test_picked_images_are_random_different_and_the_same_again(shards: Path) -> None:
    looked = Shards([f"{shards}/*.tar"])
    first = [image.data for image in looked.pick(12)]
    assert first == [image.data for image in Shards([f"{shards}/*.tar"]).pick(12)]
    assert first != [image.data for image in looked.pick(12, seed=1)]
    everything = looked.pick(1000)
    stored = [member for tar in sorted(shards.glob("*.tar")) for member in contents(tar)]
    assert [image.data for image in everything] != stored and {image.data for image in everything} == set(stored)
    assert len(everything) == 60 and {image.name for image in everything} == {"ant", "bee", "cow"}
    by_width = {10: "ant", 20: "bee", 30: "cow"}
    for image in everything:
        if not image.data.startswith(b"<html>"):
            assert by_width[open_image(image.data).size[0]] == image.name


def test_the_sheet_shows_every_image_once_and_what_is_bad() -> None:
    colours = [60, 80, 100, 120, 140, 160, 180, 200]
    picked = [Picked(encoded(300, 200, "PNG", colour), "") for colour in colours] + [Picked(b"<html>", "page")]
    sheet = contact_sheet(picked, open_image, "title", "below")
    pixels = np.asarray(sheet).reshape(-1, 3)
    for colour in colours:
        assert (pixels == (colour, 50, 200)).all(1).sum() == 150 * 225
    assert 0.8 < sheet.width / sheet.height < 2.2
    assert np.array_equal(pixels, np.asarray(contact_sheet(picked, open_image, "title", "below")).reshape(-1, 3))


@pytest.mark.parametrize("size", [(1, 1), (1, 20), (2000, 101), (101, 2000), (32, 32)])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_sheets_of_odd_images(size: tuple[int, int], count: int) -> None:
    sheet = contact_sheet([Picked(encoded(*size), "x" * 50)] * count, open_image, "title " * 99, "below")
    assert max(sheet.size) < 5000


def test_the_command(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["stats", f"{shards}/*.tar", "--workers", "1", "--sheet", str(tmp_path / "sheet.png")]
    assert run(words) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert printed.out.startswith("60 images in 9 shards, ")
    assert "decoded: all images\n" in printed.out
    assert "cannot be used: not_an_image 3 (5.0%), truncated 3 (5.0%)\n" in printed.out
    assert f"  cow        30 {40 * chr(0x2588)}\n" in printed.out
    assert run([*words, "--json", "--max", "10"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["labels"] == {"ant": 10, "bee": 20, "cow": 30} and found["sampled"] == 10
    assert len(found["quantiles"]["at"]) == len(found["quantiles"]["width"]) == 7
    with pytest.raises(UserError, match=r"sheet\.png cannot be written"):
        run([*words[:-1], "/proc/nothing/sheet.png"])
    with pytest.raises(UserError, match="no positive whole number"):
        run([*words, "--max", "some"])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_bad_images_are_named(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str) -> None:
    bad = tmp_path / "bad.jsonl"
    assert run(["stats", f"{shards}/*.tar", "--max", "all", "--bad", str(bad), "--workers", workers]) == 0
    found = [json.loads(line) for line in bad.read_text().splitlines()]
    wrong = {
        f"{name}/{number}.jpg": "not_an_image" if number == 0 else "truncated" for name in CLASSES for number in (0, 2)
    }
    assert {image["path"]: image["reason"] for image in found} == wrong and len(found) == 6
    for image in found:
        with tarfile.open(image["shard"]) as archive:
            note = archive.extractfile(f"{image['key']}.json")
            assert note is not None and json.loads(note.read())["path"] == image["path"]
    printed = capsys.readouterr().out
    for image in found:
        assert f"  {image['reason']}: {Path(image['shard']).name} {image['key']} ({image['path']})\n" in printed
    assert printed.endswith(f"{bad}: 6 bad images\n")
    with pytest.raises(UserError, match="nowhere/bad cannot be written"):
        run(["stats", f"{shards}/*.tar", "--workers", "1", "--bad", str(tmp_path / "nowhere" / "bad")])


def test_a_few_bad_images_of_each_reason_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In tars of others, without notes."""
    tar(
        tmp_path / "a.tar", {f"x/{number:02d}.v1.jpg": b"<html>" for number in range(9)} | {"y.jpg": encoded(8, 8)[:-9]}
    )
    index([f"{tmp_path}/a.tar"])
    run(["stats", f"{tmp_path}/a.tar", "--json"])
    shard = str(tmp_path / "a.tar")
    told = [("x/00", "not_an_image"), ("x/01", "not_an_image"), ("x/02", "not_an_image"), ("y", "truncated")]
    assert json.loads(capsys.readouterr().out)["bad_examples"] == [
        {"shard": shard, "key": key, "path": None, "reason": reason} for key, reason in told
    ]


def test_many_classes_are_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(50):
        (tmp_path / "photos" / f"c{number:02d}").mkdir(parents=True)
        for image in range(1 + number % 7):
            (tmp_path / "photos" / f"c{number:02d}" / f"{image}.png").write_bytes(encoded(4, 4, "PNG"))
    pack(tmp_path / "photos", tmp_path / "out", labels="folders", workers=1)
    run(["stats", f"{tmp_path}/out/*.tar", "--workers", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert "  ... 30 more" in lines and "labels: 50 classes" in lines and len(lines) < 40


def test_labels_and_names_made_to_do_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar(
        tmp_path / "a.tar",
        {"a.png": encoded(9, 9, "PNG"), "a.cls": b"2147483647", "b.png": encoded(9, 9, "PNG"), "b.cls": b"1"},
    )
    index([f"{tmp_path}/a.tar"])
    found = stats(Shards([f"{tmp_path}/a.tar"]), open_image)
    assert found.labels == {1: 1, 2**31 - 1: 1} and found.unlabelled == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["classes"] = ["", "\x1b[2J\nforged\ud800" + "x" * 10**6]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert run(["stats", f"{tmp_path}/a.tar", "--workers", "1", "--sheet", str(tmp_path / "sheet.png")]) == 0
    out = capsys.readouterr().out
    assert "\\x1b[2J\\nforged\\ud800" in out and "\x1b" not in out and "\nforged" not in out
