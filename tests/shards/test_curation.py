import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from image_inputs import folder, packed_samples, tar, tars_of
from PIL import Image

from seer.cli.shards import run
from seer.data.decode import decode, open_image
from seer.errors import UserError
from seer.shards.curation import NEAR_BITS, Curation, near_duplicates, shrunk
from seer.shards.pack import pack
from seer.shards.verify import verify

EXACT = Curation(open_image, drop_duplicates=True)


def picture(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    """A smooth random image: its look survives another size and compression."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def report(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]


def test_of_equal_files_the_first_by_path_stays(tmp_path: Path) -> None:
    files = {f"{number:02d}.jpg": bytes([number // 3]) * (100 + number % 2 * 0) for number in range(30)}
    files |= {"odd.jpg": b"y" * 101, "other.jpg": b"z" * 100}
    packed = pack(folder(tmp_path / "photos", files), tmp_path / "out", curate=EXACT, workers=1)
    kept = {path: image for path, image, *_ in packed_samples(tmp_path / "out")}
    assert kept == {name: files[name] for name in [*(f"{n:02d}.jpg" for n in range(0, 30, 3)), "odd.jpg", "other.jpg"]}
    assert report(tmp_path / "out") == [
        {"path": f"{n:02d}.jpg", "reason": "duplicate", "duplicate_of": f"{n // 3 * 3:02d}.jpg"}
        for n in range(30)
        if n % 3
    ]
    assert packed.dropped == {"duplicate": 20} and packed.samples == 12


def test_duplicates_are_found_across_inputs(tmp_path: Path) -> None:
    data = encoded(picture(0))
    photos = folder(tmp_path / "photos", {"a.jpg": data})
    theirs = tar(tmp_path / "theirs.tar", {"b.jpg": data, "c.jpg": encoded(picture(1))})
    pack([photos, theirs], tmp_path / "out", curate=EXACT, workers=1)
    assert report(tmp_path / "out") == [
        {"path": "theirs.tar/b.jpg", "reason": "duplicate", "duplicate_of": "photos/a.jpg"}
    ]


def test_small_images_and_what_is_none_are_dropped(tmp_path: Path) -> None:
    files = {
        "ok.jpg": encoded(picture(0, 64, 64)), "narrow.png": encoded(picture(1, 63, 200), "PNG"),
        "low.jpg": encoded(picture(2, 200, 63)), "page.jpg": b"<html>", "again.jpg": encoded(picture(0, 64, 64)),
    }  # fmt: skip
    wishes = Curation(open_image, drop_duplicates=True, min_side=64)
    packed = pack(folder(tmp_path / "photos", files), tmp_path / "out", curate=wishes, workers=1)
    assert packed.dropped == {"too_small": 2, "duplicate": 1, "not_an_image": 1}
    assert [path for path, *_ in packed_samples(tmp_path / "out")] == ["again.jpg"]
    with pytest.raises(UserError, match=r"nothing is left of 5 images \(.*too_small.*\)"):
        pack(tmp_path / "photos", tmp_path / "none", curate=Curation(open_image, min_side=999), workers=1)


def test_near_duplicates_leave_the_largest(tmp_path: Path) -> None:
    pytest.importorskip("imagehash")
    files = {}
    for seed in range(6):
        large = picture(seed, 384, 256)
        files[f"{seed}/a-small.jpg"] = encoded(large.resize((192, 128)), quality=50)
        files[f"{seed}/b-large.png"] = encoded(large, "PNG")
        files[f"{seed}/c-same.png"] = encoded(large, "PNG")
        files[f"{seed}/d-medium.webp"] = encoded(large.resize((300, 200)), "WEBP", quality=60)
    files["cut.jpg"] = files["0/a-small.jpg"][:-50]
    wishes = Curation(open_image, drop_duplicates=True, drop_near_duplicates=True)
    photos = folder(tmp_path / "photos", files)
    packed = pack(photos, tmp_path / "1" / "out", curate=wishes, workers=1)
    assert {path for path, *_ in packed_samples(tmp_path / "1" / "out")} == {f"{n}/b-large.png" for n in range(6)}
    assert packed.dropped == {"near_duplicate": 12, "duplicate": 6, "truncated": 1}
    for line in report(tmp_path / "1" / "out"):
        if "duplicate" in line["reason"]:
            assert line["duplicate_of"] == f"{line['path'][0]}/b-large.png"
    assert pack(photos, tmp_path / "2" / "out", curate=wishes, workers=2) != packed
    assert tars_of(tmp_path / "2" / "out") == tars_of(tmp_path / "1" / "out")


def test_bands_miss_no_near_pair() -> None:
    random = np.random.default_rng(0)
    hashes: dict[int, int] = {}
    for _ in range(40):
        centre = int(random.integers(0, 2**64, dtype=np.uint64))
        for _ in range(5):
            flipped = centre
            for bit in random.choice(64, random.integers(0, NEAR_BITS + 3), replace=False):
                flipped ^= 1 << int(bit)
            hashes[len(hashes)] = flipped
    pixels = {place: int(random.integers(1, 4)) for place in hashes}
    kept, expected = list[int](), dict[int, int]()
    for place in sorted(hashes, key=lambda place: (-pixels[place], place)):
        near = [(bits, other) for other in kept if (bits := (hashes[place] ^ hashes[other]).bit_count()) <= NEAR_BITS]
        if near:
            expected[place] = min(near)[1]
        else:
            kept.append(place)
    assert dict(near_duplicates(list(hashes), hashes, pixels)) == expected and 20 < len(expected) < 180


def test_near_duplicates_without_the_library_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagehash", None)
    folder(tmp_path / "photos", {"a.jpg": b"x"})
    with pytest.raises(UserError, match=r"needs imagehash: .* pip install 'seer\[dedup\]'"):
        pack(tmp_path / "photos", tmp_path / "out", curate=Curation(open_image, drop_near_duplicates=True), workers=1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize(("size", "expected"), [((300, 200), (100, 67)), ((90, 720), (12, 100)), ((100, 99), None)])
def test_only_larger_images_are_shrunk(kind: str, size: tuple[int, int], expected: tuple[int, int] | None) -> None:
    original = picture(3, *size)
    data = shrunk(encoded(original, kind), 100, open_image)
    if expected is None:
        assert data is None
        return
    assert data is not None
    image = decode(data)
    assert image.size == expected and data.startswith(b"\xff\xd8\xff")
    # Brightness: of colour a JPEG keeps a quarter of the pixels.
    truth = np.asarray(original.resize(expected, Image.Resampling.LANCZOS).convert("L"), float)
    assert np.abs(np.asarray(image.convert("L"), float) - truth).mean() < (12 if kind == "GIF" else 4)


def test_shrunk_images_stand_upright_and_have_no_alpha() -> None:
    image = picture(4, 300, 200)
    exif = Image.Exif()
    exif[274] = 6
    data = shrunk(encoded(image, exif=exif), 150, open_image)
    assert data is not None and decode(data).size == (100, 150)
    clear = Image.new("RGBA", (200, 200), (255, 0, 0, 0))
    data = shrunk(encoded(clear, "PNG"), 50, open_image)
    assert data is not None and decode(data).getpixel((25, 25)) == (255, 255, 255)
    assert shrunk(b"<html>", 50, open_image) is None
    assert shrunk(encoded(image)[:-200], 50, open_image) is None


def test_a_pack_with_shrunk_images(tmp_path: Path) -> None:
    files = {"large.png": encoded(picture(5, 400, 300), "PNG"), "small.png": encoded(picture(6, 90, 90), "PNG")}
    files |= {"cut.jpg": encoded(picture(7, 400, 300))[:-200], "large.jpg": encoded(picture(8, 200, 300))}
    photos = folder(tmp_path / "photos", files)
    wishes = Curation(open_image, longest_side=100)
    pack(photos, tmp_path / "1" / "out", curate=wishes, workers=1, samples_per_shard=1)
    pack(photos, tmp_path / "2" / "out", curate=wishes, workers=2, samples_per_shard=1)
    assert tars_of(tmp_path / "1" / "out") == tars_of(tmp_path / "2" / "out")
    found = {path: (image, extension) for path, image, _, extension in packed_samples(tmp_path / "1" / "out")}
    assert found["small.png"] == (files["small.png"], "png") and found["cut.jpg"] == (files["cut.jpg"], "jpg")
    assert decode(found["large.png"][0]).size == (100, 75) and found["large.png"][1] == "jpg"
    assert decode(found["large.jpg"][0]).size == (67, 100)
    assert verify([f"{tmp_path}/1/out/*.tar"]) == ([], 4)
    assert not (tmp_path / "1" / "out" / "dropped.jsonl").exists()


def test_other_wishes_are_another_pack(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos", {"a.jpg": b"x", "b.jpg": b"x"})
    out = tmp_path / "out"
    first = pack(photos, out, curate=EXACT, workers=1)
    again = pack(photos, out, curate=EXACT, workers=1)
    assert again.already_there and (again.dropped, again.samples) == (first.dropped, 1)
    for wishes in (Curation(), Curation(open_image, drop_duplicates=True, longest_side=9)):
        with pytest.raises(UserError, match="other images or options"):
            pack(photos, out, curate=wishes, workers=1)
    assert pack(photos, out, workers=1, overwrite=True).samples == 2
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json", "out-000000.tar", "out-000000.tar.seer.npz",
    ]  # fmt: skip


KILLED = """
import sys, time
from pathlib import Path
from seer.shards import curation, pack as module
real = module._write_shard
def slowly(shard):
    time.sleep(0.1)
    return real(shard)
module._write_shard = slowly
wishes = curation.Curation(drop_duplicates=True)
module.pack(Path(sys.argv[1]), Path(sys.argv[2]), samples_per_shard=2, workers=1, curate=wishes)
"""


def test_a_kill_costs_no_second_look_and_leaves_no_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = folder(tmp_path / "photos", {f"{number}.jpg": b"%02d" % (number // 2) for number in range(20)})
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed" / "out"
    wishes = Curation(drop_duplicates=True)
    pack(photos, undisturbed, samples_per_shard=2, workers=1, curate=wishes)
    command = [sys.executable, "-c", KILLED, str(photos), str(out)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as process:
        deadline = time.monotonic() + 60
        while len(list(out.glob("*.tar"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert len(list(out.glob("*.tar"))) < 5

    def never(*_: object) -> Iterator[None]:
        raise AssertionError("the images are looked at again")

    monkeypatch.setattr("seer.shards.curation.dropped", never)
    pack(photos, out, samples_per_shard=2, workers=1, curate=wishes)
    whole = {path.name: path.read_bytes() for path in undisturbed.iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(
        tmp_path / "photos", {"a.jpg": encoded(picture(0, 80, 80)), "b.jpg": encoded(picture(0, 80, 80)), "c.png": b"x"}
    )
    words = ["pack", str(tmp_path / "photos"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert run([*words, "--drop-duplicates", "--min-side", "50", "--longest-side", "64"]) == 0
    dropped, shrunken, summary, _ = capsys.readouterr().out.splitlines()
    assert dropped == f"dropped: duplicate (1), not_an_image (1); each with its reason in {tmp_path}/out/dropped.jsonl"
    assert shrunken == "shrunk: images with a side over 64 pixels, to JPEG of quality 92"
    assert "1 image in 1 shard" in summary
