"""The picture of what the network sees: every crop where it belongs, in its frame, and its box on the source."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from PIL import Image

from seer.observe.preview import COLOURS, PreviewRow, crop_places, preview_picture
from seer.pictures import RED

SOURCE, EMPTY = (90, 91, 92), (232, 233, 235)


def row(width: int, height: int, sizes: list[int], **more: str) -> PreviewRow:
    """A source of one colour, and crops each of a colour of its own; boxes of a quarter of it, side by side."""
    crops = [np.full((size, size, 3), (10 + number, 200, 7), np.uint8) for number, size in enumerate(sizes)]
    edges = [number * width // len(sizes) for number in range(len(sizes) + 1)]
    boxes = np.array([(left, height // 4, right, height // 2) for left, right in pairwise(edges)])
    return PreviewRow(Image.new("RGB", (width, height), SOURCE), (width, height), boxes, crops, "name", "about", **more)


def bounds(pixels: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int, int]:
    """Left, top, right, bottom of a colour, and how many pixels have it."""
    rows, columns = np.nonzero((pixels == colour).all(-1))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1, len(rows)


@pytest.mark.parametrize(
    "sizes", [[224] * 2 + [96] * 6, [96] * 2 + [48] * 4, [28] * 2 + [16] * 4, [600] * 3, [8], [64]]
)
def test_crops_keep_their_sizes_and_overlap_nowhere(sizes: list[int]) -> None:
    pixels = np.asarray(preview_picture([row(300, 200, sizes)], "title", "below"))
    found = [bounds(pixels, (10 + number, 200, 7)) for number in range(len(sizes))]
    zooms = []
    for (left, top, right, bottom, count), size, colour in zip(found, sizes, COLOURS, strict=False):
        assert right - left == bottom - top and count == (right - left) ** 2, "square, and nothing lies upon it"
        zooms.append((right - left) / size)
        for frame in (slice(left - 3, left), slice(right, right + 3)):
            assert (pixels[top:bottom, frame] == colour).all()
    assert np.ptp(zooms) < 0.01 and pixels.shape[1] <= 1900
    if sizes[0] <= 224:
        assert zooms[0] == max(1, 200 // sizes[0]), "whole pixels"


@pytest.mark.parametrize("zoom", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("sizes", [[224] * 2 + [96] * 6, [96, 48, 48, 48], [64] * 9 + [1] * 40, [10] + [100] * 2])
def test_places_lie_apart_and_within_bounds(sizes: list[int], zoom: float) -> None:
    places, width, height = crop_places(sizes, zoom)
    assert len(places) == len(sizes)
    for place in places:
        assert (
            place.x >= 3 and place.y >= 3 and place.x + place.side + 3 <= width and place.y + place.side + 3 <= height
        )
    for one, other in combinations(places, 2):
        apart = (one.x - other.x, one.y - other.y)
        sides = [other.side if distance > 0 else one.side for distance in apart]
        assert any(abs(distance) >= side + 12 for distance, side in zip(apart, sides, strict=True))


@pytest.mark.parametrize("size", [(300, 200), (3000, 2000), (150, 100), (1500, 100)])
def test_boxes_lie_on_the_source_in_the_colours_of_the_frames(size: tuple[int, int]) -> None:
    sizes = [224, 224, 96, 96]
    pixels = np.asarray(preview_picture([row(*size, sizes)], "title", "below"))
    left, _, right, _, _ = bounds(pixels, SOURCE)
    top = int((pixels[:, left] == SOURCE).all(-1).argmax())
    scale = min(1, 345 / size[0], 230 / size[1])
    assert right - left == round(scale * size[0])
    for number, colour in enumerate(COLOURS[: len(sizes)]):
        box = bounds(pixels[:, left:right], colour)
        expected = [number * size[0] // 4, size[1] // 4, (number + 1) * size[0] // 4, size[1] // 2]
        drawn = [box[0], box[1] - top, box[2], box[3] - top]
        assert np.abs(np.array(drawn) - np.array(expected) * scale).max() <= 1.5


def test_a_row_each_and_warnings_in_red() -> None:
    rows = [row(300, 200, [96, 48]), row(100, 300, [96, 48], warning="in the place of another")]
    picture = preview_picture(rows, "title " * 99, "below " * 99)
    plain = preview_picture(rows[:1], "t", "b")
    pixels = np.asarray(picture)
    without = preview_picture([rows[0], row(100, 300, [96, 48])], "title", "below")
    assert picture.height == without.height + 2 * 17, "a line more in each row"
    assert bounds(pixels, RED)[1] > picture.height - 60 and picture.width == plain.width
    assert (np.asarray(plain) == RED).all(-1).sum() == 0
    assert bounds(pixels, (10, 200, 7))[4] == 2 * 192**2
    assert (pixels[:, :24] == EMPTY).all() and (pixels[:, -24:] == EMPTY).all()
