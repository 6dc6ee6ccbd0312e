"""Multi-crop: where the crops of an image lie, and cutting them out (numpy and Pillow; free of torch).

Random resized crops as in SwAV (Caron et al. 2020, src/multicropdataset.py): share of the area uniform, ratio of the
sides log-uniform in [3/4, 4/3], ten tries, then the central crop whose ratio is clamped to that range; resized to a
square with antialiased bilinear interpolation; mirrored. All numbers are looked up by key: no generator is advanced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling, Transpose

# ImageNet's statistics. SwAV's own code has 0.228 for the first deviation, a slip.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# Evaluation: the central square's side over the resized image's shorter side (224 and 256).
CROP_SHARE = 0.875

_TRIES = 10
_LOG_RATIO = float(np.log(4 / 3))
# Uniform numbers a crop needs: area and ratio of each try, left, top, flip.
DRAWS = 2 * _TRIES + 3

UInt8s = NDArray[np.uint8]


@dataclass(frozen=True)
class CropSpec:
    """Crops of one resolution.

    Attributes:
        count: crops an image.
        size: side in pixels.
        min_area, max_area: range of the share of the image's area that a crop covers.
    """

    count: int
    size: int
    min_area: float
    max_area: float


@dataclass(frozen=True)
class CropPlan:
    """Where the crops of N images lie; V is the sum of the specs' counts, in their order.

    Attributes:
        boxes: (N, V, 4) int64: left, top, right, bottom in pixels.
        flips: (N, V) bool: mirrored left to right.
        scales: (N,) float64: the smallest share of its size at which an image may be decoded so that every crop still
            has at least as many pixels as it is resized to; above 1 where a crop is enlarged.
    """

    boxes: NDArray[np.int64]
    flips: NDArray[np.bool_]
    scales: NDArray[np.float64]


def plan_crops(
    sizes: NDArray[np.int64], specs: Sequence[CropSpec], uniforms: NDArray[np.float64], flip_probability: float
) -> CropPlan:
    """Random resized crops for N images at once.

    Args:
        sizes: (N, 2) int64 width and height of each image.
        specs: the resolutions; V is the sum of their counts.
        uniforms: (N, V, DRAWS) float64 in [0, 1).
        flip_probability: share of mirrored crops.
    """
    low, high, target = (
        np.concatenate([np.full(spec.count, value) for spec, value in zip(specs, values, strict=True)])
        for values in zip(*((spec.min_area, spec.max_area, spec.size) for spec in specs), strict=True)
    )
    full = sizes.astype(np.float64)[:, None, :]  # (N, 1, 2)
    share = low[:, None] + (high - low)[:, None] * uniforms[..., :_TRIES]
    area = full.prod(-1)[..., None] * share
    root_ratio = np.exp((uniforms[..., _TRIES : 2 * _TRIES] - 0.5) * _LOG_RATIO)  # sqrt of exp(U(-log 4/3, log 4/3))
    root_area = np.sqrt(area)
    tries = np.stack([np.rint(root_area * root_ratio), np.rint(root_area / root_ratio)], -1)  # (N, V, tries, 2)
    fits: NDArray[np.bool_] = np.all((tries > 0) & (tries <= full[:, :, None, :]), axis=-1)
    first = fits.argmax(-1)[..., None, None]
    cut = np.take_along_axis(tries, first, -2)[..., 0, :]
    room = np.floor(uniforms[..., 2 * _TRIES : 2 * _TRIES + 2] * (full - cut + 1))

    central = _central(sizes)[:, None, :]
    fitted = np.any(fits, axis=-1, keepdims=True)
    cut = np.where(fitted, cut, central)
    corner = np.where(fitted, room, (full - central) // 2)
    return CropPlan(
        boxes=np.concatenate([corner, corner + cut], -1).astype(np.int64),
        flips=uniforms[..., 2 * _TRIES + 2] < flip_probability,
        scales=(target[:, None] / cut).max((-1, -2)),
    )


def cut_crops(
    image: Image.Image,
    size: tuple[int, int],
    boxes: NDArray[np.int64],
    flips: NDArray[np.bool_],
    specs: Sequence[CropSpec],
    out: Sequence[UInt8s],
    row: int,
) -> None:
    """Cuts, resizes and mirrors the crops of one image.

    Args:
        image: RGB or RGBX, of ``size`` or decoded smaller.
        size: width and height that the boxes refer to.
        boxes, flips: (V, 4) and (V,): the image's part of a `CropPlan`.
        out: one (count x N, S, S, 3) uint8 array a spec; rows [v*N, (v+1)*N) belong to crop v.
        row: the image's place among N.
    """
    rectangles = scaled_boxes(boxes, size, image.size).tolist()
    for square, box, flip in zip(squares_of(specs, out, row), rectangles, flips.tolist(), strict=True):
        piece = image.resize(square.shape[:2], Resampling.BILINEAR, box=box)
        if flip:
            piece = piece.transpose(Transpose.FLIP_LEFT_RIGHT)
        square[...] = np.frombuffer(piece.tobytes("raw", "RGB"), np.uint8).reshape(square.shape)


def scaled_boxes(boxes: NDArray[np.int64], size: tuple[int, int], decoded: tuple[int, int]) -> NDArray[np.float64]:
    """(V, 4) boxes of an image of some size in one that was decoded smaller."""
    shrink = np.tile(np.divide(decoded, size), 2)
    # Rounding must not carry a box over the edge, which Pillow refuses.
    found: NDArray[np.float64] = np.minimum(boxes * shrink, np.tile(decoded, 2))
    return found


def squares_of(specs: Sequence[CropSpec], out: Sequence[UInt8s], row: int) -> Iterator[UInt8s]:
    """Where the crops of one image belong: (S, S, 3) each, in their order."""
    for spec, pixels in zip(specs, out, strict=True):
        if spec.count:
            yield from pixels[row :: len(pixels) // spec.count]


def evaluation_crop(image: Image.Image, size: int) -> UInt8s:
    """The crop that evaluation sees: shorter side to round(size / CROP_SHARE), bilinear, then the central square.

    Args:
        image: RGB.

    Returns:
        (size, size, 3) uint8.
    """
    short = round(size / CROP_SHARE)
    resized = [short * side // min(image.size) for side in image.size]
    corner = [round((side - size) / 2) for side in resized]
    # One resize of the part that stays is the same as resizing everything and cutting: the filter sees beyond its box.
    box = [
        edge * whole / side
        for edges in (corner, [start + size for start in corner])
        for edge, whole, side in zip(edges, image.size, resized, strict=True)
    ]
    piece = image.resize((size, size), Resampling.BILINEAR, box=(box[0], box[1], box[2], box[3]))
    return np.asarray(piece)


def _central(sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """(N, 2) width and height of the largest crop whose ratio lies in [3/4, 4/3]."""
    width, height = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    narrow, wide = width / height < 3 / 4, width / height > 4 / 3
    return np.stack(
        [np.where(wide, np.rint(height * 4 / 3), width), np.where(narrow, np.rint(width / (3 / 4)), height)], -1
    )
