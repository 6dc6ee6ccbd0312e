"""Hostile and odd input: what is decoded how, what is refused with which reason."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from crafted_images import chunk, encoded
from PIL import Image, PngImagePlugin

from seer.data.decode import DEFAULT_LIMITS, BadImage, ImageLimits, decode, open_image


def photo(width: int = 60, height: int = 40) -> Image.Image:
    """Red grows to the right, green downwards: every orientation looks different."""
    y, x = np.mgrid[:height, :width]
    planes = [x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 90)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def reason(data: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data)
    return caught.value.reason


def distance(image: Image.Image, expected: Image.Image) -> float:
    assert (image.mode, image.size) == ("RGB", expected.size)
    return float(np.abs(np.asarray(image, np.float64) - np.asarray(expected.convert("RGB"), np.float64)).mean())


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_lossless_formats(format: str) -> None:
    image = photo().quantize(64).convert("RGB")
    options = {"lossless": True} if format == "WEBP" else {}
    assert distance(decode(encoded(image, format, **options)), image) == 0


def test_jpeg_of_every_mode() -> None:
    assert distance(decode(encoded(photo(), "JPEG", quality=95)), photo()) < 2
    assert distance(decode(encoded(photo().convert("L"), "JPEG")), photo().convert("L")) < 2
    cmyk = photo().convert("CMYK")
    assert distance(decode(encoded(cmyk, "JPEG", quality=95)), cmyk.convert("RGB")) < 3


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(format: str, orientation: int) -> None:
    upright = photo()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose whose inverse the tag asks for
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[274] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(format, {})
    data = encoded(stored, format, exif=exif, **options)
    assert open_image(data).size == upright.size
    assert distance(decode(data), upright) < 3


def test_broken_exif_is_ignored() -> None:
    data = encoded(photo(), "JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 40)
    assert distance(decode(data), photo()) < 5


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = (np.arange(64 * 64, dtype=np.uint32) * 16).reshape(64, 64).astype(np.uint16)
    for format in ("PNG", "TIFF"):
        image = decode(encoded(Image.fromarray(grey), format))
        assert (np.asarray(image) == (grey >> 8)[..., None]).all()


def test_thirty_two_bits_are_refused() -> None:
    for dtype in (np.int32, np.float32):
        assert reason(encoded(Image.fromarray(np.full((8, 8), 4000, dtype)), "TIFF")) == "unsupported_mode"


def test_what_lies_under_transparency_does_not_show() -> None:
    alpha = np.zeros((40, 60), np.uint8)
    alpha[:, 30:] = 255
    rgba = photo().convert("RGBA")
    rgba.putalpha(Image.fromarray(alpha))
    expected = photo()
    expected.paste((255, 255, 255), (0, 0, 30, 40))
    assert distance(decode(encoded(rgba, "PNG")), expected) == 0
    grey = rgba.convert("LA")
    found = np.asarray(decode(encoded(grey, "PNG")))
    assert (found[:, :30] == 255).all() and (found[:, 30:, 0] == np.asarray(photo().convert("L"))[:, 30:]).all()

    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 10, 10])
    palette.putpixel((0, 0), 0)
    for format in ("PNG", "GIF"):
        found = np.asarray(decode(encoded(palette, format, transparency=0)))
        assert found[0, 0].tolist() == [255, 255, 255] and found[1, 1].tolist() == [200, 10, 10]
    key = np.asarray(decode(encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))))
    assert (key == 255).all()


def test_palette_and_two_levels() -> None:
    assert distance(decode(encoded(photo().quantize(200), "PNG")), photo().quantize(200)) == 0
    assert distance(decode(encoded(photo().convert("1"), "PNG")), photo().convert("1")) == 0


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_images_are_refused(format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(noise, format)
    # A TIFF keeps its directory at the end: without it the header cannot be read either.
    assert reason(data[: len(data) // 2]) in ("truncated", "undecodable", "not_an_image")
    if format in ("JPEG", "PNG"):
        assert reason(data[: len(data) // 2]) == "truncated"
        assert reason(data[:20]) in ("not_an_image", "truncated")


def test_a_jpeg_without_its_end_mark_is_truncated() -> None:
    assert reason(encoded(photo(), "JPEG")[:-2]) == "truncated"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 1000,
        b"<!DOCTYPE html><html><body>404 not found</body></html>",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        b"P6 4 4 255\n" + b"\0" * 48,  # a PPM: not on the list of formats
    ],
)
def test_what_is_no_image(data: bytes) -> None:
    assert reason(data) == "not_an_image"


def test_eps_starts_no_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary, ghostscript = tmp_path / "canary", tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {canary}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    data = encoded(photo(), "EPS")
    assert data.startswith(b"%!PS")
    assert reason(data) == "not_an_image"
    assert not canary.exists()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (9000, 9000, "too_many_pixels"),  # below Pillow's own warning
        (10000, 10000, "too_many_pixels"),  # Pillow warns and decodes
        (20000, 20000, "too_many_pixels"),  # Pillow refuses
        (DEFAULT_LIMITS.max_side + 1, 2000, "side_too_long"),
        (2100, 100, "aspect_ratio"),
        (1, 21, "aspect_ratio"),
        (0, 10, "not_an_image"),
    ],
)
def test_size_is_limited_before_anything_is_decoded(width: int, height: int, expected: str) -> None:
    assert reason(png_header(width, height)) == expected


def test_limits_are_inclusive() -> None:
    assert decode(encoded(Image.new("RGB", (40, 2)), "PNG")).size == (40, 2)
    assert open_image(png_header(8000, 8000)).size == (8000, 8000)


@pytest.mark.parametrize(
    ("limit", "holds", "refused", "expected"),
    [
        ("max_pixels", 2400, 2399, "too_many_pixels"),
        ("max_side", 60, 59, "side_too_long"),
        ("min_side", 40, 41, "side_too_short"),
        ("max_aspect_ratio", 1.5, 1.49, "aspect_ratio"),
        ("max_bytes", len(encoded(photo(), "PNG")), len(encoded(photo(), "PNG")) - 1, "too_many_bytes"),
    ],
)
def test_every_limit_is_the_callers(limit: str, holds: float, refused: float, expected: str) -> None:
    for image in (photo(), photo().transpose(Image.Transpose.ROTATE_90)):
        data = encoded(photo() if limit == "max_bytes" else image, "PNG")
        assert decode(data, ImageLimits(**{limit: holds})).mode == "RGB"  # type: ignore[arg-type]
        with pytest.raises(BadImage) as caught:
            open_image(data, ImageLimits(**{limit: refused}))  # type: ignore[arg-type]
        assert caught.value.reason == expected


def test_a_bomb_of_scans_is_refused() -> None:
    """Each scan of a progressive JPEG passes over the whole picture: 95 bytes cost 40 ms of an 8000 x 8000 one."""
    data = encoded(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    scans = data.count(b"\xff\xda")
    assert decode(data[:-2] + last * (100 - scans) + b"\xff\xd9").size == (64, 64)
    assert reason(data[:-2] + last * (101 - scans) + b"\xff\xd9") == "too_many_scans"


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_a_bomb_of_strips_is_refused(order: str, big: bool) -> None:
    """Pillow lists them all when it opens a TIFF: 64 MB of them would take 4 GB."""
    word, count = ("Q", "Q") if big else ("I", "H")
    for strips, expected in ((64, "good"), (100_001, "too_many_strips")):
        tags = {256: 64, 257: 64, 258: 8, 259: 1, 262: 1, 273: 0, 277: 1, 278: 1}
        start = 16 if big else 8
        end = start + struct.calcsize(f"{order}{count}") + len(tags) * (20 if big else 12) + 8
        head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", 43 if big else 42)
        head += struct.pack(f"{order}HHQ", 8, 0, start) if big else struct.pack(f"{order}I", start)
        rows = [
            (tag, 4, strips, end) if tag == 273 else (tag, 16 if big else 4, 1, value) for tag, value in tags.items()
        ]
        directory = struct.pack(f"{order}{count}", len(rows)) + b"".join(
            struct.pack(f"{order}HH{word}{word}", *row) for row in rows
        )
        data = (head + directory).ljust(end, b"\0") + struct.pack(f"{order}{strips}I", *[end] * strips) + bytes(64)
        if expected != "good":
            assert reason(data) == expected
        elif (big, order) != (True, ">"):  # which Pillow does not know
            assert decode(data).size == (64, 64)


def test_a_text_bomb_is_refused() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * 80_000_000, zip=True)
    data = encoded(photo(), "PNG", pnginfo=info)
    assert len(data) < 200_000
    assert reason(data) in ("undecodable", "not_an_image")


@pytest.mark.parametrize("error", [MemoryError(), SyntaxError("x"), struct.error("x"), ValueError("x"), OSError("x")])
def test_whatever_a_decoder_raises_is_the_images_fault(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: object) -> None:
        raise error

    data = encoded(photo(), "PNG")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    assert reason(data) == ("out_of_memory" if isinstance(error, MemoryError) else "undecodable")


def test_flipped_bytes_never_escape() -> None:
    rng = np.random.default_rng(1)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        data = bytearray(encoded(photo(), format))
        for _ in range(40):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 4):
                damaged[place] ^= int(rng.integers(1, 256))
            try:
                assert decode(bytes(damaged)).mode == "RGB"
            except BadImage as error:
                assert error.reason


def test_a_jpeg_is_decoded_smaller_where_that_will_do() -> None:
    image = photo(800, 600)
    exif = Image.Exif()
    exif[274] = 6
    for data, size in ((encoded(image, "JPEG"), (800, 600)), (encoded(image, "JPEG", exif=exif), (600, 800))):
        opened = open_image(data)
        assert opened.size == size
        assert opened.load(0.3).size == (size[0] // 2, size[1] // 2)
        assert open_image(data).load(0.6).size == size
        assert open_image(data).load(2.0).size == size
    assert open_image(encoded(image, "PNG")).load(0.1).size == (800, 600)


@pytest.mark.parametrize(
    "segment", ["fffe0002", "ffe50002", "ffe50000", "ff", "ffd9", "ff00", "fff0", "ffe10008457869660000"]
)
def test_a_jpeg_of_endless_segments(segment: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    data = buffer.getvalue()
    began = time.monotonic()
    for count in (501, 20_000_000 // len(segment)):
        with pytest.raises(BadImage, match="too_many_segments"):
            decode(data[:2] + bytes.fromhex(segment) * count + data[2:])
    assert time.monotonic() - began < 1
    if segment == "fffe0002":
        assert decode(data[:2] + bytes.fromhex(segment) * 480 + data[2:]).size == (8, 8)
