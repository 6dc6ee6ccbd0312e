"""What the network sees, as a picture: each image with the boxes of its crops, and the crops as they reach it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.Image import Resampling

from seer.pictures import FAINT, INK, PAPER, RED, fitted, font

# Of one crop after the other; they come again where there are more.
COLOURS = (
    *((228, 26, 28), (0, 114, 224), (250, 200, 0), (40, 165, 60), (160, 70, 190), (255, 125, 0)),
    *((0, 190, 205), (245, 100, 170), (130, 85, 40), (150, 215, 40), (20, 30, 130), (120, 125, 130)),
)
_MARGIN, _GAP, _FRAME, _HEAD, _LINE, _BETWEEN = 24, 6, 3, 76, 17, 20
_WIDEST = 1900
_LEAST = 200  # pixels; smaller crops are enlarged by a whole factor, up to that
_ASPECT = 1.5  # of the place for the source


@dataclass(frozen=True)
class PreviewRow:
    """An image and its V crops.

    Attributes:
        source: the image as it stands upright, RGB, of any resolution.
        size: width and height that the boxes refer to.
        boxes: (V, 4): left, top, right, bottom.
        crops: V arrays (S, S, 3) uint8; those of one size stand together, the same sizes in every row.
        name, about: of the image, for the line below.
        warning: a second line, in red; "" for none.
    """

    source: Image.Image
    size: tuple[int, int]
    boxes: NDArray[np.int64]
    crops: Sequence[NDArray[np.uint8]]
    name: str
    about: str
    warning: str = ""


class Place(NamedTuple):
    """Where a crop lies within its row: the corner of its pixels, and their side."""

    x: int
    y: int
    side: int


def preview_picture(rows: Sequence[PreviewRow], title: str, below: str) -> Image.Image:
    """Draws the rows one below the other; crops keep their sizes relative to each other.

    Args:
        rows: at least one.
        title, below: two lines above them.
    """
    sizes = [len(crop) for crop in rows[0].crops]
    zoom = _zoom(sizes)
    places, width, height = crop_places(sizes, zoom)
    room = round(_ASPECT * height), height
    shown = [_shrunk(row.source, row.size, room, zoom) for row in rows]
    column = max(picture.width for picture in shown)
    lines = 1 + any(row.warning for row in rows)
    step = height + 6 + lines * _LINE + _BETWEEN
    inner = column + 3 * _GAP + width
    sheet = Image.new("RGB", (inner + 2 * _MARGIN, _HEAD + step * len(rows) - _BETWEEN + _MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 18), fitted(draw, title, 18, inner), fill=INK, font=font(18))
    draw.text((_MARGIN, 44), fitted(draw, below, 13, inner), fill=FAINT, font=font(13))
    for number, (row, picture) in enumerate(zip(rows, shown, strict=True)):
        top = _HEAD + number * step
        sheet.paste(_with_boxes(picture, row), (_MARGIN, top + (height - picture.height) // 2))
        left = _MARGIN + column + 3 * _GAP
        for crop, place, colour in zip(row.crops, places, _colours(), strict=False):
            x, y, side = left + place.x, top + place.y, place.side
            draw.rectangle((x - _FRAME, y - _FRAME, x + side + _FRAME - 1, y + side + _FRAME - 1), fill=colour)
            sheet.paste(_resized(Image.fromarray(crop), (side, side)), (x, y))
        _caption(draw, row, (_MARGIN, top + height + 6), inner)
    return sheet


def crop_places(sizes: Sequence[int], zoom: float) -> tuple[list[Place], int, int]:
    """Where the crops of a row lie, their frames' width and height together.

    Large crops stand beside each other; smaller ones of one size in as many lines as about fit into their height.

    Args:
        sizes: of all crops, equal ones together.
        zoom: pixels of the picture for one of a crop.
    """
    largest = round(max(sizes) * zoom) + 2 * _FRAME + _GAP
    places: list[Place] = []
    right = bottom = 0
    for size, group in groupby(sizes):
        count, side = len(list(group)), max(1, round(size * zoom))
        step = side + 2 * _FRAME + _GAP
        columns = -(-count // max(1, round(largest / step)))
        places += [
            Place(right + column * step + _FRAME, line * step + _FRAME, side)
            for line, column in (divmod(number, columns) for number in range(count))
        ]
        right += columns * step
        bottom = max(bottom, -(-count // columns) * step)
    return places, right - _GAP, bottom - _GAP


def _zoom(sizes: Sequence[int]) -> float:
    whole = max(1, _LEAST // max(sizes))
    steps: tuple[float, ...] = (*range(whole, 0, -1), *(share / 20 for share in range(19, 0, -1)))
    return next((zoom for zoom in steps if _width(sizes, zoom) <= _WIDEST), steps[-1])


def _width(sizes: Sequence[int], zoom: float) -> float:
    _, width, height = crop_places(sizes, zoom)
    return width + 3 * _GAP + _ASPECT * height + 2 * _MARGIN


def _shrunk(source: Image.Image, size: tuple[int, int], room: tuple[int, int], zoom: float) -> Image.Image:
    """The source as large as fits into the room, a small one no larger than its crops are drawn."""
    scale = min(room[0] / size[0], room[1] / size[1], max(1, zoom))
    return _resized(source, (max(1, round(size[0] * scale)), max(1, round(size[1] * scale))))


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    if picture.size == size:
        return picture
    # Enlarged, pixels stay what they are.
    return picture.resize(size, Resampling.NEAREST if size[0] >= 2 * picture.width else Resampling.LANCZOS)


def _with_boxes(picture: Image.Image, row: PreviewRow) -> Image.Image:
    drawn = picture.copy()
    draw = ImageDraw.Draw(drawn)
    scale = np.tile(np.divide(picture.size, row.size), 2)
    outlines = [
        (np.rint(box * scale).astype(int).tolist(), colour) for box, colour in zip(row.boxes, _colours(), strict=False)
    ]
    # Large ones first: small ones lie upon them.
    outlines.sort(key=lambda outline: (outline[0][0] - outline[0][2]) * (outline[0][3] - outline[0][1]))
    for (left, top, right, bottom), colour in outlines:
        right, bottom = max(left, right - 1), max(top, bottom - 1)
        draw.rectangle((left, top, right, bottom), outline=colour, width=2)
    return drawn


def _caption(draw: ImageDraw.ImageDraw, row: PreviewRow, at: tuple[int, int], width: int) -> None:
    name = fitted(draw, row.name, 13, 0.6 * width)
    draw.text(at, name, fill=INK, font=font(13))
    x = at[0] + round(draw.textlength(name, font=font(13))) + 12
    draw.text((x, at[1]), fitted(draw, row.about, 13, at[0] + width - x), fill=FAINT, font=font(13))
    if row.warning:
        draw.text((at[0], at[1] + _LINE), fitted(draw, row.warning, 13, width), fill=RED, font=font(13))


def _colours() -> Iterator[tuple[int, int, int]]:
    while True:
        yield from COLOURS
