"""Every form of every format ends as RGB the way a viewer shows it; numpy computes from the samples what that is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from crafted_images import chunk, encoded, png, tiff
from image_cases import CASES, image_of, samples, smooth
from numpy.typing import NDArray
from PIL import Image

from seer.data.decode import decode, open_image


@pytest.mark.parametrize("name", CASES)
def test_shown_as_a_viewer_does(name: str) -> None:
    data, expected, slack = CASES[name]
    image = decode(data)
    assert image.mode == "RGB" and open_image(data).size == image.size == expected.shape[1::-1]
    assert np.abs(np.asarray(image) - expected).max() <= slack


def stored(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """How a camera stores an upright picture under an EXIF orientation, which names the sides of row 0 and column 0."""
    rows_and_columns: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
        1: lambda p: p,  # top, left
        2: lambda p: p[:, ::-1],  # top, right
        3: lambda p: p[::-1, ::-1],  # bottom, right
        4: lambda p: p[::-1],  # bottom, left
        5: lambda p: p.swapaxes(0, 1),  # left, top
        6: lambda p: p[:, ::-1].swapaxes(0, 1),  # right, top
        7: lambda p: p[::-1, ::-1].swapaxes(0, 1),  # right, bottom
        8: lambda p: p[::-1].swapaxes(0, 1),  # left, bottom
    }
    return np.ascontiguousarray(rows_and_columns[orientation](pixels))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF-16"])
def test_orientation(format: str, orientation: int) -> None:
    pixels = smooth()
    exif = Image.Exif()
    exif[274] = orientation
    if format == "TIFF-16":
        pixels = np.repeat(pixels[..., :1], 3, -1)
        data = tiff(stored(pixels, orientation)[..., :1].astype(np.int64) * 257, 1, 16, tags={274: orientation})
    else:
        options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
        data = encoded(image_of(stored(pixels, orientation)), format, exif=exif, **options)
    assert open_image(data).size == (64, 48)
    assert np.abs(np.asarray(decode(data)) * 1.0 - pixels).max() <= 6


def test_the_content_counts_and_what_is_declared_does_not() -> None:
    """A PNG whose ancillary chunks say nonsense is still the picture that its data say."""
    values = samples(3, 8)
    more = chunk(b"gAMA", b"\0" * 4) + chunk(b"pHYs", b"\0" * 9) + chunk(b"prVt", b"x" * 100)
    assert (np.asarray(decode(png(values, 2, 8, more=more))) == values).all()


@pytest.mark.parametrize("name", ["png-colour0-16bit", "tiff-grey-16bit-little"])
def test_sixteen_bits_keep_their_order(name: str) -> None:
    """Scaled, not clipped: a ramp over all 65,536 levels stays a ramp over all 256."""
    ramp = np.arange(65536).reshape(256, 256, 1)
    data = png(ramp, 0, 16) if name.startswith("png") else tiff(ramp, 1, 16)
    grey = np.asarray(decode(data))[..., 0].reshape(-1)
    assert (np.bincount(grey, minlength=256) == 256).all() and (np.diff(grey.astype(int)) >= 0).all()
