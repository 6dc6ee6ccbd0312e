"""What the pictures that seer draws have in common: their colours, text that fits, files that are whole."""

from __future__ import annotations

import io
from bisect import bisect_right
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from seer.errors import printable
from seer.files import cannot_write, write_atomically

INK, RED = (33, 37, 41), (205, 52, 52)
# Photographs, white ones too, stand out from this grey.
PAPER, FAINT = (232, 233, 235), (98, 104, 111)
_LONGEST = 1000  # characters of which any can be seen


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, pixels high."""
    try:
        return ImageFont.load_default(size)
    except TypeError:  # pillow-simd follows an older Pillow, whose one font has one size
        return ImageFont.load_default()


def fitted(draw: ImageDraw.ImageDraw, text: str, size: int, width: float) -> str:
    """The text in one line, or its beginning and an ellipsis, no wider than so many pixels."""
    used, ellipsis = font(size), "\u2026"
    text = printable(text[:_LONGEST])
    if isinstance(used, ImageFont.ImageFont):  # that of pillow-simd
        text, ellipsis = text.encode("latin-1", "replace").decode("latin-1"), "..."
    if draw.textlength(text, font=used) <= width:
        return text
    lengths = range(1, len(text))
    fits = bisect_right(lengths, width, key=lambda length: draw.textlength(text[:length] + ellipsis, font=used))
    return text[:fits] + ellipsis


def save_png(picture: Image.Image, file: Path) -> None:
    """Writes the whole file or nothing; its folder is made.

    Raises:
        UserError: it cannot be written.
    """
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, buffer.getvalue())
    except OSError as error:
        raise cannot_write(file, error) from None
