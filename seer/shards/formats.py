"""Which format some bytes claim to be by how they begin; what opens them is handed in by those who may import it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from PIL import Image

LONGEST_START = 16  # bytes that `extension_of` looks at
_STARTS = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)


def extension_of(data: bytes) -> str | None:
    """jpg, png, webp, gif, bmp or tif by the first bytes; None for anything else."""
    for start, extension in _STARTS:
        if data.startswith(start):
            return extension
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    # Two letters are little to go by: a bitmap also has zeros in its reserved words.
    return "bmp" if data[:2] == b"BM" and data[6:10] == bytes(4) else None


class Opened(Protocol):
    """An image whose header was read, as `seer.data.decode.OpenedImage`."""

    size: tuple[int, int]

    def load(self, scale: float = 1.0) -> Image.Image: ...


OpenImage = Callable[[bytes], Opened]
"""Bytes to an image; what it and `load` raise has a `reason` (`seer.data.decode.open_image`)."""
