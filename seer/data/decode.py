"""Bytes of unknown origin to an RGB image, or the reason why not (Pillow; free of torch).

What Pillow does with hostile or odd input was tried case by case; the rules here are what keeps training safe: few
formats (EPS would start Ghostscript), limits before anything is decoded, and any exception is the fault of the image.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from PIL.Image import Transpose
from PIL.TiffImagePlugin import TiffImageFile

# Pillow warns of what is refused or repaired here anyway. Once for the process: warnings.catch_warnings is not for
# threads, and evaluation decodes in threads.
warnings.filterwarnings("ignore", module="PIL")

# AVIF is left out because pillow-simd lacks it: the same shards would give other batches.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# A scan of a progressive JPEG may be a few bytes that cost a pass over all pixels: a megabyte of them takes minutes.
# Cameras and programs write about 10, the keenest optimisers some 60.
_MAX_SCANS = 100
# Pillow makes 250 bytes of each entry in a TIFF's list of strips or tiles, at opening: a file of 64 MB would cost 4 GB.
_MAX_STRIPS = 100_000
# Pillow goes through what stands before the pixels of a JPEG step by step: 60 MB of empty segments take it a minute and
# 2 GB. Cameras write some 20, a colour profile has 255 at most.
_MAX_SEGMENTS = 500
_BAND_PIXELS = 1 << 20

# EXIF tag 274 -> what undoes it.
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)
_STRIPS_AND_TILES = (273, 324)  # tags of their offsets in a TIFF
_BITS_PER_SAMPLE, _PHOTOMETRIC, _ORIENTATION = 258, 262, 274  # tags of TIFF and EXIF
_EXIF_CARRIERS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")


@dataclass(frozen=True)
class ImageLimits:
    """What is refused before anything is decoded; all limits are inclusive.

    Attributes:
        max_pixels: width times height; Pillow itself refuses more than 178,956,970.
        max_side, min_side: of the longer and of the shorter side, pixels.
        max_aspect_ratio: longer over shorter side.
        max_bytes: of the file.
    """

    max_pixels: int = 64_000_000
    max_side: int = 30_000
    min_side: int = 1
    max_aspect_ratio: float = 20.0
    max_bytes: int = 64_000_000

    def refuse_bytes(self, size: int) -> None:
        """Refuses a file by its size, which an index tells before the file is read.

        Raises:
            BadImage: it is too large.
        """
        if size > self.max_bytes:
            raise BadImage("too_many_bytes")

    def refuse_size(self, width: int, height: int) -> None:
        """Refuses an image by what its header says.

        Raises:
            BadImage: a side, their product or their ratio is beyond the limits.
        """
        longer, shorter = max(width, height), min(width, height)
        if shorter < 1:
            raise BadImage("not_an_image")
        if longer > self.max_side:
            raise BadImage("side_too_long")
        if shorter < self.min_side:
            raise BadImage("side_too_short")
        if width * height > self.max_pixels:
            raise BadImage("too_many_pixels")
        if longer > self.max_aspect_ratio * shorter:
            raise BadImage("aspect_ratio")


class BadImage(Exception):
    """Bytes that are no usable image.

    Args:
        reason: one word: not_an_image, truncated, too_many_bytes, too_many_pixels, side_too_long, side_too_short,
            aspect_ratio, too_many_scans, too_many_segments, too_many_strips, unsupported_mode, out_of_memory,
            undecodable.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


DEFAULT_LIMITS = ImageLimits()


class OpenedImage:
    """An image whose header was read: its size is known before its pixels are decoded.

    Attributes:
        data: the file.
        orientation: as EXIF says: what `upright` undoes.
        size: width and height in pixels, as it stands upright.
    """

    def __init__(self, data: bytes, image: Image.Image, orientation: int) -> None:
        self.data, self._image, self.orientation = data, image, orientation
        width, height = image.size
        self.size = (height, width) if orientation in _SWAPS_SIDES else (width, height)

    @property
    def stored_size(self) -> tuple[int, int]:
        """Width and height in pixels, as the file has them."""
        return self._image.size

    @property
    def is_jpeg(self) -> bool:
        """Also of those that hold a second picture for other uses (MPO), of which the first counts."""
        return self._image.format in ("JPEG", "MPO")

    def divisor(self, scale: float) -> int:
        """8, 4, 2 or 1: by how much smaller a JPEG is decoded where `scale` of each side will do."""
        if scale > 0.5:
            return 1
        sides = [(side, max(1, int(side * scale))) for side in self._image.size]
        return next(divisor for divisor in (8, 4, 2, 1) if all(side // least >= divisor for side, least in sides))

    def load(self, scale: float = 1.0) -> Image.Image:
        """The decoded image in RGB, upright.

        Args:
            scale: the smallest share of each side that will do; a JPEG is then decoded at 1/2, 1/4 or 1/8 of its size
                where that is enough, which is several times faster.

        Raises:
            BadImage: the pixels cannot be decoded.
        """
        try:
            if self.is_jpeg and (divisor := self.divisor(scale)) > 1:
                width, height = self._image.size
                self._image.draft("RGB", (width // divisor, height // divisor))
            tiles = getattr(self._image, "tile", [])  # gone after load
            self._image.load()
            image = _rgb(self._image, tiles[0][3] if tiles else None)
            if self._image.format == "GIF" and tiles and tiles[0][1] != (0, 0, *image.size):
                image = _frame_on_white(image, tiles[0][1])
            return upright(image, self.orientation)
        except BadImage:
            raise
        except Exception as error:  # decoders raise whatever they like: SyntaxError, struct.error, MemoryError
            raise BadImage(_reason(error, "undecodable")) from error


def open_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> OpenedImage:
    """Reads the header and refuses what is no image or beyond the limits.

    Raises:
        BadImage: with the reason.
    """
    limits.refuse_bytes(len(data))
    try:
        if data[:4] in _TIFF_DIRECTORIES:
            _refuse_strips(data)
        if data[:2] == b"\xff\xd8":
            _refuse_segments(data)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        limits.refuse_size(*image.size)
        if "progressive" in image.info and data.count(b"\xff\xda") > _MAX_SCANS:
            raise BadImage("too_many_scans")
        return OpenedImage(data, image, _orientation(image))
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(_reason(error, "not_an_image")) from error


def decode(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """The whole image, upright, in RGB.

    Raises:
        BadImage: with the reason.
    """
    return open_image(data, limits).load()


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Undoes an EXIF orientation."""
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


# How a TIFF and a BigTIFF begin -> the directory's place and where that stands, its count, an entry, as formats.
_TIFF_DIRECTORIES = {
    b"II*\0": ("<I", 4, "<H", "<HHI4x"),
    b"MM\0*": (">I", 4, ">H", ">HHI4x"),
    b"II+\0": ("<Q", 8, "<Q", "<HHQ8x"),
    b"MM\0+": (">Q", 8, ">Q", ">HHQ8x"),
}


_WITH_LENGTH = frozenset(bytes([marker]) for marker in (*range(0xC0, 0xD0), *range(0xDB, 0xF0), 0xFE))


def _refuse_strips(data: bytes) -> None:
    place, at, number, entry = _TIFF_DIRECTORIES[data[:4]]
    (directory,) = struct.unpack_from(place, data, at)
    (entries,) = struct.unpack_from(number, data, directory)
    first = directory + struct.calcsize(number)
    for row in range(entries):
        tag, _, count = struct.unpack_from(entry, data, first + row * struct.calcsize(entry))
        if tag in _STRIPS_AND_TILES and count > _MAX_STRIPS:
            raise BadImage("too_many_strips")


def _refuse_segments(data: bytes) -> None:
    """As Pillow walks: a marker is ff and a byte; some have a length and as many bytes behind them."""
    at = 2
    for _ in range(_MAX_SEGMENTS):
        marker = data[at + 1 : at + 2]
        if data[at : at + 1] != b"\xff" or marker in (b"", b"\xda"):
            return
        if marker == b"\xff":
            at += 1  # a filler
        elif marker in _WITH_LENGTH:
            at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
        else:
            at += 2
    raise BadImage("too_many_segments")


def _orientation(image: Image.Image) -> int:
    # TIFF turns itself upright; reading EXIF costs as much as decoding a very small image, so only where there is some.
    if image.format == "TIFF" or not any(carrier in image.info for carrier in _EXIF_CARRIERS):
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF in an image that is otherwise good
        return 1


def _rgb(image: Image.Image, raw_mode: object) -> Image.Image:
    """Every mode to RGB without surprises: Pillow clips 16 bits to white and drops alpha over hidden colour.

    Args:
        image: loaded.
        raw_mode: how the pixels stood in the file, as Pillow's decoders call it.
    """
    mode = image.mode
    if mode.startswith("I;16"):
        return _sixteen_bits(image).convert("RGB")
    if mode in ("I", "F"):
        raise BadImage("unsupported_mode")
    if (scale := _TRANSPARENT_VALUE.get(str(raw_mode))) and "transparency" in image.info:
        image.info["transparency"] = scale(image.info["transparency"])
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _over_white(image)
    return image if mode == "RGB" else image.convert("RGB")


# A PNG names its transparent colour in the depth of the file; Pillow looks for it among pixels that it has brought to 8
# bits. Of 16 bits only the upper half is left: what differs from the colour in the lower half alone goes with it.
_TRANSPARENT_VALUE: dict[str, Callable[[Any], Any]] = {
    "L;2": lambda grey: grey * 85,
    "L;4": lambda grey: grey * 17,
    "RGB;16B": lambda colour: tuple(value >> 8 for value in colour),
}


def _sixteen_bits(image: Image.Image) -> Image.Image:
    """The upper 8 of 12 or 16 bits, with what Pillow leaves undone: white that is zero, a transparent grey."""
    levels = np.asarray(image)
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    (bits,) = tags.get(_BITS_PER_SAMPLE, (16,))
    grey = (levels >> (bits - 8)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:
        grey = 255 - grey
    if (transparent := image.info.get("transparency")) is not None:
        grey = np.where(levels == transparent, np.uint8(255), grey)
    return Image.fromarray(grey)


def _over_white(image: Image.Image) -> Image.Image:
    """In bands, so that a large image is held twice in memory and not five times."""
    width, height = image.size
    rows = max(1, _BAND_PIXELS // width)
    rgb = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        layer = image.crop((0, top, width, min(top + rows, height))).convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        rgb.paste(Image.alpha_composite(white, layer).convert("RGB"), (0, top))
    return rgb


def _frame_on_white(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """A first frame smaller than the whole picture: nothing stands around it, where Pillow fills in a colour."""
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image.crop(box), box)
    return white


def _reason(error: Exception, otherwise: str) -> str:
    if isinstance(error, MemoryError):
        return "out_of_memory"
    if isinstance(error, Image.DecompressionBombError):
        return "too_many_pixels"
    return "truncated" if "truncated" in str(error).lower() else otherwise
