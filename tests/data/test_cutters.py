"""Every decoder that is installed: the pixels, the crops and the refusals of Pillow."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from crafted_images import encoded
from image_cases import CASES
from numpy.typing import NDArray
from PIL import Image

from seer.data import cutters
from seer.data.crops import CropSpec
from seer.data.cutters import cutter_of
from seer.data.decode import BadImage, decode, open_image
from seer.decoders import DECODERS, installed_decoders

INSTALLED = installed_decoders()
FASTER = [decoder for decoder in INSTALLED if decoder.startswith("simplejpeg")]
needs_simplejpeg = pytest.mark.skipif(not FASTER, reason="simplejpeg is not installed")


def photo(width: int, height: int, grain: int = 9) -> Image.Image:
    """Noise, enlarged so many times: edges and smooth parts, as photographs have them."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // grain + 1, width // grain + 1, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def cut(
    decoder: str, data: bytes, box: tuple[int, ...], side: int, *, scale: float = 1.0, flip: bool = False
) -> NDArray[np.int64]:
    """One crop, (S, S, 3)."""
    out = [np.zeros((1, side, side, 3), np.uint8)]
    opened = open_image(data)
    cutter_of(decoder)(opened, scale, np.array([box]), np.array([flip]), [CropSpec(1, side, 0.1, 1.0)], out, 0)
    return out[0][0].astype(np.int64)


def resized(image: Image.Image, box: tuple[int, ...], side: int) -> NDArray[np.int64]:
    """What the published recipe does: cut, then resize."""
    return np.asarray(image.crop(box).resize((side, side), Image.Resampling.BILINEAR)).astype(np.int64)


def with_orientation(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(image, "JPEG", exif=exif, quality=90)


def as_phones_write(image: Image.Image) -> bytes:
    """A JPEG with a second picture (MPO)."""
    data = encoded(image, "MPO", save_all=True, append_images=[Image.new("RGB", (60, 40), (9, 9, 9))], quality=90)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    return data


@needs_simplejpeg
@pytest.mark.parametrize("channels", ["RGB", "RGBX"])
def test_simplejpeg_gives_pillows_pixels_at_every_size(channels: str) -> None:
    decoded = cutters._jpeg_decoder(channels)
    taken = {name for name, (data, _, _) in CASES.items() if decoded(open_image(data), 1.0) is not None}
    plain = {name for name in CASES if name.startswith("jpeg")}
    # Its colours are right in each of these; the others are for Pillow.
    assert taken == plain - {"jpeg-rgb", "jpeg-cmyk", "jpeg-cmyk-without-adobe-marker", "jpeg-ycck"}
    images = [CASES[name][0] for name in taken]
    images += [encoded(photo(*size), "JPEG", quality=90) for size in ((500, 375), (333, 257), (17, 9), (8, 8), (1, 3))]
    images += [encoded(photo(333, 257), "JPEG", subsampling=kind) for kind in ("4:4:4", "4:2:2", "4:2:0")]
    images += [as_phones_write(photo(333, 257)), encoded(photo(333, 257).convert("L"), "JPEG", progressive=True)]
    for data in images:
        sizes = set()
        for scale in (1.0, 0.51, 0.5, 0.3, 0.25, 0.126, 0.1):
            found, expected = decoded(open_image(data), scale), np.asarray(open_image(data).load(scale))
            assert found is not None and found.shape[:2] == expected.shape[:2]
            assert (found[..., :3] == expected).all()
            sizes.add(found.shape[:2])
        assert len(sizes) == (4 if min(expected.shape[:2]) > 9 else len(sizes))


@pytest.mark.parametrize("decoder", INSTALLED)
@pytest.mark.parametrize("name", CASES)
def test_every_format(decoder: str, name: str) -> None:
    data, expected, slack = CASES[name]
    image = decode(data)
    whole = (0, 0, *image.size)
    found = cut(decoder, data, whole, 32)
    assert np.abs(found - resized(image, whole, 32)).max() <= 1
    shown = resized(Image.fromarray(np.rint(expected).astype(np.uint8)), whole, 32)
    assert np.abs(found - shown).max() <= slack + 2


@pytest.mark.parametrize("decoder", INSTALLED)
@pytest.mark.parametrize("side", [24, 96, 224])
def test_crops_are_pillows(decoder: str, side: int) -> None:
    """Within a level; where Pillow cuts, its filter sees beyond the box, so that its borders are others."""
    image = photo(500, 375)
    data = encoded(image, "JPEG", quality=90)
    decoded = decode(data)
    for box in ((0, 0, 500, 375), (13, 27, 310, 332), (100, 0, 190, 101), (499, 374, 500, 375)):
        for flip in (False, True):
            expected = resized(decoded, box, side)
            expected = expected[:, ::-1] if flip else expected
            rim = 0 if decoder == "simplejpeg" else -(-side // 12)
            inner = slice(rim, side - rim)
            difference = np.abs(cut(decoder, data, box, side, flip=flip) - expected)[inner, inner]
            assert difference.max() <= (1 if decoder == "simplejpeg" else 3)


@pytest.mark.parametrize("decoder", INSTALLED)
def test_an_image_decoded_smaller_gives_nearly_the_same_crops(decoder: str) -> None:
    data, box = encoded(photo(1600, 1200, grain=60), "JPEG", quality=95), (101, 33, 1290, 1111)
    whole = cut(decoder, data, box, 96)
    for scale in (0.5, 0.25, 0.125):
        smaller = cut(decoder, data, box, 96, scale=scale)
        assert (smaller != whole).any()
        if decoder == "simplejpeg":  # whose boxes are whole pixels of the smaller image
            assert np.abs(smaller - whole).mean() < 4
        else:
            assert np.abs(smaller - whole).mean() < 1
            assert (smaller == cut("pillow", data, box, 96, scale=scale)).all()


@pytest.mark.parametrize("decoder", INSTALLED)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_undone_before_the_crop(decoder: str, orientation: int) -> None:
    data = with_orientation(photo(90, 60), orientation)
    image = decode(data)
    box = (5, 7, 50, 55)
    assert open_image(data).size == image.size == ((90, 60) if orientation < 5 else (60, 90))
    inner = slice(4, -4)
    difference = cut(decoder, data, box, 24) - resized(image, box, 24)
    assert np.abs(difference)[inner, inner].max() <= 3
    smaller = cut(decoder, data, (0, 0, *image.size), 24, scale=0.5)
    assert np.abs(smaller - resized(image, (0, 0, *image.size), 24)).mean() < 6


@pytest.mark.parametrize("decoder", INSTALLED)
def test_a_picture_with_a_second_one_is_decoded_smaller(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = as_phones_write(photo(800, 600))
    assert open_image(data).load(0.3).size == (400, 300)
    assert np.abs(np.asarray(open_image(data).load(), np.int64) - photo(800, 600)).mean() < 3
    whole = cut(decoder, data, (0, 0, 800, 600), 64)
    assert 0 < np.abs(cut(decoder, data, (0, 0, 800, 600), 64, scale=0.3) - whole).mean() < 2


def tiny_boxes() -> list[tuple[int, int, int, int]]:
    return [(x, y, x + w, y + h) for x in range(3) for y in range(2) for w in (1, 2) for h in (1, 2)]


@pytest.mark.parametrize("decoder", INSTALLED)
@pytest.mark.parametrize("scale", [1.0, 0.3, 0.05])
def test_a_picture_of_a_few_pixels(decoder: str, scale: float) -> None:
    """Decoded smaller, its boxes are parts of a pixel."""
    data = encoded(Image.new("RGB", (4, 3), (200, 100, 50)), "JPEG", quality=95)
    for box in tiny_boxes():
        assert np.abs(cut(decoder, data, box, 8, scale=scale) - (200, 100, 50)).max() < 9


def broken(kind: str) -> bytes:
    data = encoded(photo(120, 90), "JPEG", quality=90)
    return {
        "half": data[: len(data) // 2],
        "without its end": data[:-2],
        "html": b"<html>" * 99,
        "a second start": data[:300] + data,
        "garbage inside": data[:900] + bytes(range(256)) * 3 + data[1600:],
        "bytes flipped": data[:900] + bytes(255 - byte for byte in data[900:920]) + data[920:],
        "lines missing": data[:163] + data[163:].replace((90).to_bytes(2, "big"), (190).to_bytes(2, "big"), 1),
    }[kind]


KINDS = ["half", "without its end", "html", "a second start", "garbage inside", "bytes flipped", "lines missing"]


@pytest.mark.parametrize("decoder", INSTALLED)
@pytest.mark.parametrize("kind", KINDS)
def test_pillow_decides_what_is_bad_and_why(decoder: str, kind: str) -> None:
    data = broken(kind)
    try:
        image = decode(data)
    except BadImage as error:
        with pytest.raises(BadImage) as caught:
            cut(decoder, data, (0, 0, 64, 64), 16)
        assert caught.value.reason == error.reason
        assert kind in ("half", "without its end", "html") or error.reason in ("undecodable", "not_an_image")
    else:
        whole = (0, 0, *image.size)
        assert np.abs(cut(decoder, data, whole, 16) - resized(image, whole, 16)).max() <= 1
        assert kind not in ("half", "without its end", "html")


@needs_simplejpeg
@pytest.mark.parametrize("error", [ValueError("x"), MemoryError()])
def test_where_simplejpeg_fails_pillow_decides(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    import simplejpeg

    def fails(*_: object, **__: object) -> None:
        raise error

    data = encoded(photo(90, 60), "JPEG")
    expected = [cut(decoder, data, (0, 0, 90, 60), 24) for decoder in FASTER]
    monkeypatch.setattr(simplejpeg, "decode_jpeg", fails)
    assert all(
        (cut(decoder, data, (0, 0, 90, 60), 24) == one).all() for decoder, one in zip(FASTER, expected, strict=True)
    )


@needs_simplejpeg
def test_only_the_decoder_that_resizes_with_torch_imports_it() -> None:
    code = "import sys\nfrom seer.data.cutters import cutter_of\n"
    code += "for decoder in sys.argv[1:]: cutter_of(decoder); print(decoder, 'torch' in sys.modules)"
    others = [decoder for decoder in DECODERS if decoder != "simplejpeg"]
    ran = subprocess.run(
        [sys.executable, "-c", code, *others, "simplejpeg"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines() == [*(f"{decoder} False" for decoder in others), "simplejpeg True"]


@needs_simplejpeg
def test_threads_of_the_process_stay_as_they_are() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        cut("simplejpeg", encoded(photo(90, 60), "JPEG"), (0, 0, 90, 60), 24, flip=True)
        with pytest.raises(BadImage):
            cut("simplejpeg", broken("half"), (0, 0, 64, 64), 16)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_fastest_that_is_installed_comes_first() -> None:
    assert len({"pillow", "pillow-simd"} & set(INSTALLED)) == 1
    assert [name for name in DECODERS if name in INSTALLED] == INSTALLED
