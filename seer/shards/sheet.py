"""A contact sheet: random images of the shards as they are, in rows of one height, each with its class and size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from PIL.Image import Resampling

from seer.pictures import FAINT, INK, PAPER, RED, fitted, font
from seer.shards.formats import OpenImage
from seer.shards.stats import Picked

_MARGIN, _GAP, _HEAD, _LINE = 20, 10, 64, 14
_ROW = 150  # height of a row of large images
_SMALLEST_ROW = 64
_ENLARGED = 2  # small images at most: blown up further one sees blocks, not images
_SHAPE = 1.4  # width of the sheet by its height
_WIDEST = 5  # a tile by its height; panoramas beyond are drawn lower
_NARROWEST_SHEET = 420
_NARROWEST = 56  # a caption needs some room


@dataclass(frozen=True)
class _Tile:
    """One image of the sheet; without a picture it is one that cannot be used."""

    picture: Image.Image | None
    size: str
    name: str
    aspect: float


def contact_sheet(picked: Sequence[Picked], open_image: OpenImage, title: str, below: str) -> Image.Image:
    """Draws the images in their order, rows filled from left to right.

    Args:
        picked: at least one image.
        open_image: bytes to an image; what it cannot open is drawn as an empty tile with the reason.
        title, below: two lines above the images.
    """
    tiles = [_tile(image, open_image) for image in picked]
    heights = [tile.picture.height for tile in tiles if tile.picture is not None]
    row = min(_ROW, max(_SMALLEST_ROW, _ENLARGED * int(np.median(heights)) if heights else 0))
    captions = _LINE * (1 + any(tile.name for tile in tiles)) + 4
    widths = [max(_NARROWEST, round(min(tile.aspect, _WIDEST) * row)) for tile in tiles]
    # As many rows as make the sheet the shape of a screen.
    rows = max(1, round(np.sqrt(sum(widths) / (_SHAPE * (row + captions + _GAP)))))
    placed = _rows(widths, rows)
    inner = max(_NARROWEST_SHEET, *(sum(widths[tile] + _GAP for tile in line) - _GAP for line in placed))
    step = row + captions + _GAP
    sheet = Image.new("RGB", (inner + 2 * _MARGIN, _HEAD + step * len(placed) + _MARGIN - _GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 12), fitted(draw, title, 18, inner), fill=INK, font=font(18))
    draw.text((_MARGIN, 36), fitted(draw, below, 12, inner), fill=FAINT, font=font(12))
    for number, line in enumerate(placed):
        # Rows end at the same edge: what is missing goes between the images.
        slack = inner - sum(widths[tile] + _GAP for tile in line) + _GAP
        extra = slack / (len(line) - 1) if len(placed) > 1 and len(line) > 1 else 0.0
        x = float(_MARGIN)
        for tile in line:
            _draw(sheet, draw, tiles[tile], round(x), _HEAD + number * step, widths[tile], row)
            x += widths[tile] + _GAP + extra
    return sheet


def _tile(image: Picked, open_image: OpenImage) -> _Tile:
    try:
        opened = open_image(image.data)
        width, height = opened.size
        picture = opened.load(min(1.0, 2 * _ROW / height))
    except Exception as error:
        reason = getattr(error, "reason", None)
        if reason is None:
            raise
        return _Tile(None, str(reason), image.name, 1.5)
    return _Tile(picture, f"{width} x {height}", image.name, width / height)


def _rows(widths: Sequence[int], rows: int) -> list[list[int]]:
    """Which tile stands in which row: all rows about equally long."""
    middles = np.cumsum(widths) - np.array(widths) / 2
    row_of = (middles / sum(widths) * rows).astype(int)
    return [np.flatnonzero(row_of == row).tolist() for row in np.unique(row_of)]


def _draw(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: _Tile, x: int, y: int, width: int, height: int) -> None:
    if tile.picture is None:
        draw.rectangle((x, y, x + width - 1, y + height - 1), outline=RED)
    else:
        size = (max(1, min(width, round(tile.aspect * height))), max(1, min(height, round(width / tile.aspect))))
        sheet.paste(tile.picture.resize(size, Resampling.LANCZOS), (x, y + (height - size[1]) // 2))
    lines = [(tile.name, INK)] if tile.name else []
    lines.append((tile.size, FAINT if tile.picture is not None else RED))
    for number, (text, colour) in enumerate(lines):
        draw.text((x, y + height + 2 + number * _LINE), fitted(draw, text, 11, width), fill=colour, font=font(11))
