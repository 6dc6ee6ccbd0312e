"""Where crops lie and what is in them, against random resized crop written out for one crop."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from seer.data.crops import DRAWS, CropPlan, CropSpec, cut_crops, evaluation_crop, plan_crops
from seer.keyed_random import uniforms


def plan(
    sizes: list[tuple[int, int]], specs: list[CropSpec], flip_probability: float = 0.5, batch_index: int = 0
) -> CropPlan:
    crops = sum(spec.count for spec in specs)
    numbers = uniforms(0, "test", batch_index, np.arange(len(sizes)), crops, DRAWS)
    return plan_crops(np.array(sizes), specs, numbers, flip_probability)


def oracle(width: int, height: int, low: float, high: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Random resized crop as SwAV's transforms do it, one crop, its own random numbers: left, top, width, height."""
    for _ in range(10):
        area = width * height * rng.uniform(low, high)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize(
    ("size", "spec"),
    [
        ((500, 375), CropSpec(2, 224, 0.14, 1.0)),
        ((500, 375), CropSpec(4, 96, 0.05, 0.14)),
        ((90, 400), CropSpec(2, 224, 0.3, 1.0)),  # often no try fits
        ((32, 32), CropSpec(2, 28, 0.3, 1.0)),
    ],
)
def test_distribution_equals_the_oracles(size: tuple[int, int], spec: CropSpec) -> None:
    images = 4000 // spec.count
    boxes = plan([size] * images, [spec]).boxes.reshape(-1, 4).astype(np.float64)
    left, top, width, height = boxes[:, 0], boxes[:, 1], boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    rng = np.random.default_rng(0)
    expected = np.array([oracle(*size, spec.min_area, spec.max_area, rng) for _ in range(4000)], np.float64).T
    for found, other in (
        (left, expected[0]),
        (top, expected[1]),
        (width * height, expected[2] * expected[3]),
        (np.log(width / height), np.log(expected[2] / expected[3])),
    ):
        assert stats.ks_2samp(found, other).pvalue > 1e-4


def test_numbers_become_the_box_that_they_say() -> None:
    numbers = np.full((1, 1, DRAWS), 0.5)
    numbers[..., 0] = 1.0 - 1e-12  # the first try wants the whole area, at ratio 1: it does not fit into 100 x 50
    numbers[..., 1] = 0.0  # the second wants a quarter: 35.36 squared
    found = plan_crops(np.array([[100, 50]]), [CropSpec(1, 8, 0.25, 1.0)], numbers, 0.5)
    assert found.boxes[0, 0].tolist() == [33, 8, 68, 43]  # left: floor(0.5 x 66), top: floor(0.5 x 16)
    assert not found.flips[0, 0]


def test_central_crop_where_no_try_fits() -> None:
    # Even the smallest area is wider than the image.
    specs = [CropSpec(1, 8, 0.9, 1.0)]
    for size, box in (((20, 400), [0, 186, 20, 213]), ((400, 30), [180, 0, 220, 30])):
        assert plan([size] * 3, specs).boxes[:, 0].tolist() == [box] * 3


def test_boxes_lie_inside_and_areas_in_range() -> None:
    rng = np.random.default_rng(2)
    sizes = [(int(w), int(h)) for w, h in rng.integers(1, 300, (400, 2))]
    specs = [CropSpec(2, 64, 0.3, 1.0), CropSpec(3, 32, 0.05, 0.14)]
    boxes = plan(sizes, specs).boxes
    assert boxes.shape == (400, 5, 4)
    assert (boxes[..., :2] >= 0).all() and (boxes[..., 2:] <= np.array(sizes)[:, None]).all()
    assert (boxes[..., 2:] > boxes[..., :2]).all()
    big = np.array(sizes).min(1) > 100
    share = (boxes[..., 2:] - boxes[..., :2]).prod(-1) / np.array(sizes).prod(-1)[:, None]
    assert (share[big, 2:] < 0.15).all() and (share[big, 2:] > 0.045).all()


def test_flips_have_their_probability() -> None:
    for probability, low, high in ((0.0, 0, 0), (1.0, 4000, 4000), (0.5, 1850, 2150)):
        flips = plan([(32, 32)] * 1000, [CropSpec(4, 8, 0.1, 1)], probability).flips
        assert low <= flips.sum() <= high


def test_crops_of_a_slot_do_not_depend_on_the_other_slots() -> None:
    specs = [CropSpec(2, 8, 0.1, 1)]
    numbers = uniforms(0, "test", 3, np.arange(6), 2, DRAWS)
    whole = plan_crops(np.array([(50, 40)] * 6), specs, numbers, 0.5)
    part = plan_crops(np.array([(50, 40)] * 2), specs, numbers[2:4], 0.5)
    assert (part.boxes == whole.boxes[2:4]).all() and (part.flips == whole.flips[2:4]).all()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def cut(images: list[Image.Image], specs: list[CropSpec], found: CropPlan) -> list[NDArray[np.uint8]]:
    out = [np.zeros((spec.count * len(images), spec.size, spec.size, 3), np.uint8) for spec in specs]
    for row, image in enumerate(images):
        cut_crops(image, image.size, found.boxes[row], found.flips[row], specs, out, row)
    return out


def test_pixels_equal_crop_then_resize_in_crop_major_rows() -> None:
    specs = [CropSpec(2, 24, 0.3, 1.0), CropSpec(0, 5, 0.1, 1.0), CropSpec(3, 16, 0.05, 0.2)]
    images = [noise(90, 60, 1), noise(32, 32, 2), noise(20, 45, 3)]
    found = plan([image.size for image in images], specs)
    large, none, small = cut(images, specs, found)
    assert none.shape == (0, 5, 5, 3)
    for row, image in enumerate(images):
        for crop in range(5):
            pixels, side, place = (large, 24, crop) if crop < 2 else (small, 16, crop - 2)
            part = image.crop(tuple(found.boxes[row, crop])).resize((side, side), Image.Resampling.BILINEAR)
            expected = np.asarray(part, np.int64)
            if found.flips[row, crop]:
                expected = expected[:, ::-1]
            difference = np.abs(pixels[place * 3 + row] - expected)
            # The filter sees beyond the box where crop() would repeat its edge: only the border differs.
            assert difference[1:-1, 1:-1].max() <= 3
    assert found.flips.any() and not found.flips.all()


def test_an_image_decoded_smaller_gives_nearly_the_same_crops() -> None:
    y, x = np.mgrid[:400, :640]
    smooth = np.stack([x * 255 // 639, y * 255 // 399, (x + y) % 256], -1).astype(np.uint8)
    image = Image.fromarray(smooth).resize((640, 400), Image.Resampling.BILINEAR)
    spec = [CropSpec(2, 32, 0.3, 1.0)]
    found = plan([image.size], spec)
    assert found.scales[0] < 0.5
    full = cut([image], spec, found)[0].astype(np.int64)
    out = [np.zeros((2, 32, 32, 3), np.uint8)]
    cut_crops(image.reduce(2), image.size, found.boxes[0], found.flips[0], spec, out, 0)
    assert np.abs(out[0][..., :2] - full[..., :2]).max() <= 2


def test_scale_keeps_every_crop_at_least_as_large_as_its_size() -> None:
    found = plan([(1600, 1200)] * 200, [CropSpec(2, 224, 0.14, 1.0), CropSpec(4, 96, 0.05, 0.14)])
    sides = (found.boxes[..., 2:] - found.boxes[..., :2]) * found.scales[:, None, None]
    targets = np.array([224, 224, 96, 96, 96, 96])[None, :, None]
    assert (sides >= targets - 1e-6).all()
    assert np.allclose((sides / targets).min((1, 2)), 1)


@pytest.mark.parametrize(("size", "side"), [((500, 375), 224), ((96, 96), 64), ((32, 32), 28), ((41, 300), 32)])
def test_evaluation_crop_equals_resize_then_centre_crop(size: tuple[int, int], side: int) -> None:
    image = noise(*size).resize(size)
    short = round(side / 0.875)
    resized = image.resize(
        (short, short * size[1] // size[0]) if size[0] <= size[1] else (short * size[0] // size[1], short),
        Image.Resampling.BILINEAR,
    )
    left, top = round((resized.width - side) / 2), round((resized.height - side) / 2)
    expected = np.asarray(resized.crop((left, top, left + side, top + side)), np.int64)
    found = evaluation_crop(image, side)
    assert found.dtype == np.uint8 and found.shape == (side, side, 3)
    assert np.abs(found - expected).max() <= 1


def test_what_workers_import_is_free_of_torch() -> None:
    code = "import seer.data.pool, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
