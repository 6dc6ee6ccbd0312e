"""From an opened image to its crops, by each of `seer.decoders` (free of torch until one that needs it is used).

Every decoder takes the same images and refuses the same ones: simplejpeg gets only what Pillow has opened, and where it
fails Pillow decides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from seer.data.crops import CropSpec, UInt8s, cut_crops, scaled_boxes, squares_of
from seer.data.decode import OpenedImage, upright

# What `seer.data.crops.cut_crops` is told of the crops, passed on as it comes: boxes (V, 4), flips (V,), specs, the
# arrays of a batch, row.
_Where = tuple[NDArray[np.int64], NDArray[np.bool_], Sequence[CropSpec], Sequence[UInt8s], int]
# Takes an opened image, the smallest scale that will do, and these five.
Cutter = Callable[[OpenedImage, float, *_Where], None]

# EXIF tag 274 -> rows and columns as the picture stands upright, in the same memory.
_UPRIGHT_VIEWS: dict[int, Callable[[UInt8s], UInt8s]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}


@functools.cache
def cutter_of(decoder: str) -> Cutter:
    """What decodes an opened image and cuts, resizes and mirrors its crops (`seer.data.crops.cut_crops`).

    Its libraries are imported here.

    Raises (when it is called):
        BadImage: the pixels cannot be decoded.
    """
    return {
        "pillow": lambda: _with_pillow,
        "pillow-simd": lambda: _with_pillow,
        "simplejpeg": _simplejpeg_and_torch,
        "simplejpeg+pillow-simd": _simplejpeg_and_pillow,
    }[decoder]()


def _with_pillow(opened: OpenedImage, scale: float, *where: *_Where) -> None:
    cut_crops(opened.load(scale), opened.size, *where)


def _simplejpeg_and_pillow() -> Cutter:
    decode = _jpeg_decoder("RGBX")

    def cut(opened: OpenedImage, scale: float, *where: *_Where) -> None:
        pixels = decode(opened, scale)
        if pixels is None:
            return _with_pillow(opened, scale, *where)
        # Four bytes a pixel are how Pillow keeps an RGB image: it is not copied.
        image = Image.frombuffer("RGBX", pixels.shape[1::-1], pixels, "raw", "RGBX", 0, 1)
        return cut_crops(upright(image, opened.orientation), opened.size, *where)

    return cut


def _simplejpeg_and_torch() -> Cutter:
    import torch
    from torch.nn.functional import interpolate

    decode = _jpeg_decoder("RGB")

    def cut(opened: OpenedImage, scale: float, *where: *_Where) -> None:
        boxes, flips, specs, out, row = where
        pixels = decode(opened, scale)
        if pixels is None:
            pixels = np.asarray(opened.load(scale))
        elif opened.orientation in _UPRIGHT_VIEWS:
            pixels = _UPRIGHT_VIEWS[opened.orientation](pixels)
        rectangles = np.rint(scaled_boxes(boxes, opened.size, pixels.shape[1::-1])).astype(np.int64)
        # Of a very small picture a box may be rounded to nothing.
        rectangles[:, :2] = np.minimum(rectangles[:, :2], np.array(pixels.shape[1::-1]) - 1)
        rectangles[:, 2:] = np.maximum(rectangles[:, 2:], rectangles[:, :2] + 1)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # several would wait for each other longer than all of this takes
        try:
            for square, (left, top, right, bottom), flip in zip(
                squares_of(specs, out, row), rectangles.tolist(), flips.tolist(), strict=True
            ):
                # Contiguous, and with a dimension in front before the channels are moved: else torch goes a slower way.
                piece = torch.from_numpy(pixels[None, top:bottom, left:right].copy("C")).permute(0, 3, 1, 2)
                resized = interpolate(piece, square.shape[:2], mode="bilinear", antialias=True)
                square[...] = (resized.flip(3) if flip else resized)[0].permute(1, 2, 0).numpy()
        finally:
            torch.set_num_threads(threads)

    return cut


def _jpeg_decoder(channels: str) -> Callable[[OpenedImage, float], UInt8s | None]:
    """Bytes to pixels as the file has them, (H, W, channels); None: Pillow is to decide."""
    import simplejpeg

    def decode(opened: OpenedImage, scale: float) -> UInt8s | None:
        if not opened.is_jpeg:
            return None
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(opened.data)
            if (width, height) != opened.stored_size or colours not in ("YCbCr", "Gray"):
                return None
            divisor = opened.divisor(scale)
            least = [-(-side // divisor) for side in (height, width)] if divisor > 1 else [0, 0]
            pixels: UInt8s = simplejpeg.decode_jpeg(opened.data, channels, min_height=least[0], min_width=least[1])
        except (ValueError, MemoryError):
            return None
        return pixels

    return decode
