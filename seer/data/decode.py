"""Bytes of unknown origin to an RGB image, or the reason why not (Pillow; free of torch).

What Pillow does with hostile or odd input was tried case by case; the rules here are what keeps training safe: few
formats (EPS would start Ghostscript), limits before anything is decoded, and any exception is the fault of the image.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image
from PIL.Image import Transpose

# Pillow warns of what is refused or repaired here anyway. Once for the process: warnings.catch_warnings is not for
# threads, and evaluation decodes in threads.
warnings.filterwarnings("ignore", module="PIL")

# AVIF is left out because pillow-simd lacks it: the same shards would give other batches.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64_000_000
MAX_SIDE = 30_000
MAX_ASPECT = 20

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
_ORIENTATION = 274
_EXIF_CARRIERS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")


class BadImage(Exception):
    """Bytes that are no usable image.

    Args:
        reason: one word: not_an_image, truncated, too_many_pixels, side_too_long, aspect_ratio, unsupported_mode,
            out_of_memory, undecodable.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class OpenedImage:
    """An image whose header was read: its size is known before its pixels are decoded.

    Attributes:
        size: width and height in pixels, as it stands upright (EXIF orientation applied).
    """

    def __init__(self, image: Image.Image, orientation: int) -> None:
        self._image, self._orientation = image, orientation
        width, height = image.size
        self.size = (height, width) if orientation in _SWAPS_SIDES else (width, height)

    def load(self, scale: float = 1.0) -> Image.Image:
        """The decoded image in RGB, upright.

        Args:
            scale: the smallest share of each side that will do; a JPEG is then decoded at 1/2, 1/4 or 1/8 of its size
                where that is enough, which is several times faster.

        Raises:
            BadImage: the pixels cannot be decoded.
        """
        try:
            if scale <= 0.5 and self._image.format == "JPEG":
                width, height = self._image.size
                # draft never goes below the size it is given.
                self._image.draft("RGB", (max(1, int(width * scale)), max(1, int(height * scale))))
            self._image.load()
            image = _rgb(self._image)
            if self._orientation in _UPRIGHT:
                image = image.transpose(_UPRIGHT[self._orientation])
            return image
        except BadImage:
            raise
        except Exception as error:  # decoders raise whatever they like: SyntaxError, struct.error, MemoryError
            raise BadImage(_reason(error, "undecodable")) from error


def open_image(data: bytes) -> OpenedImage:
    """Reads the header and refuses what is no image or beyond the limits.

    Raises:
        BadImage: with the reason.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        _refuse_size(width, height)
        return OpenedImage(image, _orientation(image))
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(_reason(error, "not_an_image")) from error


def decode(data: bytes) -> Image.Image:
    """The whole image, upright, in RGB.

    Raises:
        BadImage: with the reason.
    """
    return open_image(data).load()


def _refuse_size(width: int, height: int) -> None:
    if min(width, height) < 1:
        raise BadImage("not_an_image")
    if max(width, height) > MAX_SIDE:
        raise BadImage("side_too_long")
    if width * height > MAX_PIXELS:
        raise BadImage("too_many_pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage("aspect_ratio")


def _orientation(image: Image.Image) -> int:
    # TIFF turns itself upright; reading EXIF costs as much as decoding a very small image, so only where there is some.
    if image.format == "TIFF" or not any(carrier in image.info for carrier in _EXIF_CARRIERS):
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF in an image that is otherwise good
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    """Every mode to RGB without surprises: Pillow clips 16 bits to white and drops alpha over hidden colour."""
    mode = image.mode
    if mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        raise BadImage("unsupported_mode")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


def _reason(error: Exception, otherwise: str) -> str:
    if isinstance(error, MemoryError):
        return "out_of_memory"
    if isinstance(error, Image.DecompressionBombError):
        return "too_many_pixels"
    return "truncated" if "truncated" in str(error).lower() else otherwise
