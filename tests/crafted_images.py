"""Images made byte by byte, in the forms that Pillow reads and cannot write: what stands in them is known exactly."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Adam7: first row, first column, step of rows, step of columns of each pass.
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of each colour type of PNG


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    """An image as Pillow writes it."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG with its length and checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    samples: NDArray[np.int64],
    colour: int,
    depth: int,
    *,
    palette: bytes = b"",
    transparency: bytes = b"",
    interlaced: bool = False,
    more: bytes = b"",
) -> bytes:
    """A PNG of any colour type and depth.

    Args:
        samples: (H, W, C) values below 2 ** depth.
        colour: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA.
        palette, transparency: contents of PLTE and tRNS.
        more: chunks before the data.
    """
    height, width = samples.shape[:2]
    passes = [samples[row::down, column::right] for row, column, down, right in ADAM7] if interlaced else [samples]
    rows = b"".join(b"\0" + _packed(row, depth) for part in passes if part.size for row in part)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    tables = b"".join(chunk(name, data) for name, data in ((b"PLTE", palette), (b"tRNS", transparency)) if data)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + tables + more + data + chunk(b"IEND", b"")


def _packed(row: NDArray[np.int64], depth: int) -> bytes:
    if depth == 16:
        return row.astype(">u2").tobytes()
    bits = (row.reshape(-1, 1) >> np.arange(depth - 1, -1, -1)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1)).tobytes()


def tiff(
    samples: NDArray[np.int64], photometric: int, depth: int, *, order: str = "<", tags: dict[int, int] | None = None
) -> bytes:
    """An uncompressed TIFF of one strip.

    Args:
        samples: (H, W, C) values below 2 ** depth.
        photometric: 0 white is zero, 1 black is zero, 2 RGB, 5 CMYK.
        order: ``<`` or ``>``, of the bytes.
        tags: further ones with one short value each.
    """
    height, width, channels = samples.shape
    data = samples.astype(f"{order}u2").tobytes() if depth == 16 else b"".join(_packed(row, depth) for row in samples)
    wide = channels > 2  # several values of a tag stand outside of it
    entries = {256: width, 257: height, 258: depth, 259: 1, 262: photometric, 273: 0, 277: channels, 278: height}
    entries |= {279: len(data)} | (tags or {})
    directory = 2 + 12 * len(entries) + 4
    bits_at = 8 + directory
    entries[273] = bits_at + (2 * channels if wide else 0)
    out = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8) + struct.pack(f"{order}H", len(entries))
    for tag, value in sorted(entries.items()):
        if tag == 258 and wide:
            out += struct.pack(f"{order}HHII", tag, 3, channels, bits_at)
        elif tag == 258 and channels == 2:
            out += struct.pack(f"{order}HHIHH", tag, 3, 2, depth, depth)
        elif tag in (273, 279):
            out += struct.pack(f"{order}HHII", tag, 4, 1, value)
        else:
            out += struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
    out += struct.pack(f"{order}I", 0)
    return out + (struct.pack(f"{order}{channels}H", *[depth] * channels) if wide else b"") + data


def jpeg_marker(data: bytes, marker: int) -> int:
    """Where a segment of a JPEG begins (its 0xff)."""
    at = 2
    while data[at + 1] != marker:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at
