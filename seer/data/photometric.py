"""Colour, blur and normalisation of uint8 crops, batched on the device that trains.

The operations are those of SwAV's augmentation (Caron et al. 2020, src/multicropdataset.py) in floating point instead
of 8 bits: brightness, contrast, saturation and hue in each crop's own random order, grayscale, Gaussian blur. They are
the same on every device; benchmarks/bench_photometric.py measures them against Pillow's chain.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from seer.data.crops import MEAN, STD
from seer.data.photometric_parameters import (
    CONTRAST,
    GRAYSCALE,
    HUE,
    JITTER,
    ORDER,
    ORDERS,
    SATURATION,
    SIGMA,
    PhotometricSpec,
)

# Luma of ITU-R 601.
_LUMA = (0.2989, 0.587, 0.114)
_RADIUS = 6  # three standard deviations of the strongest blur
# Values worked on together: on a CPU few enough for its caches, many enough that the calls themselves cost little.
_VALUES_AT_ONCE = {"cpu": 2**19}
_VALUES_AT_ONCE_ELSEWHERE = 2**27

# Where hue stands in each order, and the operations before and after it (padded with -1: nothing).
_HUE_PLACE = np.array([order.index(HUE) for order in ORDERS])
_BEFORE = np.array([(*order[: order.index(HUE)], -1, -1, -1)[:3] for order in ORDERS])
_AFTER = np.array([(*order[order.index(HUE) + 1 :], -1, -1, -1)[:3] for order in ORDERS])


@torch.no_grad()
def photometric(
    crops_u8: Tensor, parameters: Tensor, spec: PhotometricSpec, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Augments and normalises crops.

    With x in [0, 1] and luma g = 0.2989 R + 0.587 G + 0.114 B: brightness, contrast and saturation are
    clamp(f x + (1 - f) t, 0, 1) with t = 0, the mean of g over the crop, and g; hue is turned in HSV; grayscale is g in
    three channels; the blur is a true Gaussian of 13 taps, reflected at the border (Pillow's, which SwAV uses, is an
    approximation by boxes).

    Args:
        crops_u8: (M, H, W, 3) uint8.
        parameters: (M, P) float32 of `photometric_parameters`; on the CPU, where the rows are sorted.
        spec: the distribution they come from: what it never does is left out.
        dtype: of the result and of all arithmetic.

    Returns:
        (M, 3, H, W) in channels_last memory, normalised by ImageNet's mean and deviation, on the device of the crops.
    """
    device, (_, height, width, _) = crops_u8.device, crops_u8.shape
    numbers = parameters.cpu().numpy()
    # Hue is dear and the other three are alike. With crops sorted by how many operations come before their hue, every
    # step concerns neighbouring rows: no crop is computed for nothing, nothing is gathered.
    jittered = numbers[:, JITTER] > 0
    order = np.where(jittered, numbers[:, ORDER], 0).astype(np.int64)
    before = np.where(jittered, _HUE_PLACE[order], -1)
    rows = np.argsort(-before, kind="stable")
    numbers, before = numbers[rows], before[rows]
    steps = torch.from_numpy(_steps(numbers, order[rows])).to(device, dtype, non_blocking=True)
    places = torch.from_numpy(rows).to(device, non_blocking=True)

    out = torch.empty(crops_u8.shape, device=device, dtype=dtype)
    at_once = _VALUES_AT_ONCE.get(device.type, _VALUES_AT_ONCE_ELSEWHERE)
    size = max(1, at_once // (3 * height * width))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        x = _to_planes(crops_u8.index_select(0, places[part]), dtype)
        _jitter(x, steps[part], numbers[part, HUE], before[part], turn=spec.hue != 0)
        _grayscale(x, numbers[part, GRAYSCALE])
        with torch.autocast(device.type, enabled=False):  # the blur's products would become bf16
            _blur(x, numbers[part, SIGMA])
        for channel, (mean, deviation) in enumerate(zip(MEAN, STD, strict=True)):
            x[:, channel].sub_(mean).mul_(1 / deviation)
        # Interleaved first: index_copy of a permuted tensor is twice as slow as both.
        out.index_copy_(0, places[part], x.permute(0, 2, 3, 1).contiguous())
    return out.permute(0, 3, 1, 2)


def _to_planes(crops_u8: Tensor, dtype: torch.dtype) -> Tensor:
    """(m, H, W, 3) uint8 -> (m, 3, H, W) in [0, 1], contiguous."""
    return crops_u8.permute(0, 3, 1, 2).contiguous().to(dtype).mul_(1 / 255)


def _steps(numbers: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(M, 6, 3) for three steps before and three after the hue: factor of x, of its luma, and of its mean luma."""
    operations = np.concatenate([_BEFORE[order], _AFTER[order]], axis=1)
    factors = np.take_along_axis(numbers, np.maximum(operations, 0), axis=1)
    rest = 1 - factors
    return np.stack([factors, rest * (operations == SATURATION), rest * (operations == CONTRAST)], -1)


def _jitter(x: Tensor, steps: Tensor, turns: np.ndarray, before: np.ndarray, *, turn: bool) -> None:
    """Colour jitter in place; rows are sorted by falling `before` (operations before hue; -1: no jitter)."""
    jittered = int((before >= 0).sum())
    for step in range(3):
        _blend(x[: int((before > step).sum())], steps[:, step])
    if turn and jittered:
        _turn_hue(x[:jittered], torch.from_numpy(turns[:jittered]).to(x.device, x.dtype, non_blocking=True))
    for step in range(3):
        first = int((before > 2 - step).sum())
        _blend(x[first:jittered], steps[first:jittered, 3 + step])


def _luma(x: Tensor) -> Tensor:
    """(m, 3, H, W) -> (m, H, W)"""
    red, green, blue = _LUMA
    return (x[:, 0] * red).add_(x[:, 1], alpha=green).add_(x[:, 2], alpha=blue)


def _blend(x: Tensor, steps: Tensor) -> None:
    """One of brightness, contrast, saturation for each crop, in place."""
    if len(x) == 0:
        return
    factor, of_luma, of_mean = steps[: len(x), :, None, None].unbind(1)
    luma = _luma(x)
    other = torch.addcmul(luma.mean((1, 2), keepdim=True) * of_mean, luma, of_luma)
    x.mul_(factor[:, None]).add_(other[:, None]).clamp_(0, 1)


def _turn_hue(x: Tensor, turns: Tensor) -> None:
    """Turns the hue in HSV, in place; x (m, 3, H, W) in [0, 1], turns (m,) parts of the circle.

    With value and saturation kept, the largest and the smallest value of a pixel stay, and each channel is a trapezoid
    of the hue. Selection by weights of 0 and 1: `where` and boolean masks are several times slower on a CPU.
    """
    red, green, blue = x.unbind(1)
    low = torch.minimum(red, green)
    blue_lowest = low.clone().ge_(blue)
    red_lower = green.clone().ge_(red)
    low = torch.minimum(low, blue, out=low)
    chroma = torch.maximum(red, green)
    torch.maximum(chroma, blue, out=chroma).sub_(low)
    # Hue in sixths: 1 + (G-R) / chroma where blue is lowest, 3 + (B-G) / chroma for red, 5 + (R-B) / chroma for green.
    hue = torch.lerp(red - blue, blue - green, red_lower)
    hue.lerp_(green - red, blue_lowest).div_(chroma.clamp_min(torch.finfo(x.dtype).tiny))
    hue.add_(red_lower.mul_(-2).add_(4).addcmul_(red_lower, blue_lowest, value=-1))
    hue.mul_(1 / 6).add_((turns + 1 / 6)[:, None, None])
    hue.sub_(hue.floor()).mul_(6)
    trapezoid = blue_lowest
    for channel, (centre, sign, top) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        torch.sub(hue, centre, out=trapezoid)
        trapezoid.abs_().mul_(sign).add_(top).clamp_(0, 1)
        torch.addcmul(low, chroma, trapezoid, out=x[:, channel])


def _grayscale(x: Tensor, on: np.ndarray) -> None:
    """Luma in all three channels where `on`, in place."""
    rows = torch.from_numpy(np.flatnonzero(on)).to(x.device, non_blocking=True)
    if len(rows):
        x.index_copy_(0, rows, _luma(x.index_select(0, rows))[:, None].expand(-1, 3, -1, -1))


def _blur(x: Tensor, sigma: np.ndarray) -> None:
    """Gaussian blur in place where sigma (m,) > 0, along both axes by a banded matrix for each crop.

    At the sizes of crops a product with a mostly empty matrix beats passes over the image, one for each of the 13 taps,
    and convolution with a kernel for each crop, on CPUs and GPUs alike.
    """
    on = np.flatnonzero(sigma > 0)
    if len(on) == 0:
        return
    rows = torch.from_numpy(on).to(x.device, non_blocking=True)
    taps = np.exp(-0.5 * (np.arange(_RADIUS + 1) / sigma[on, None].astype(np.float64)) ** 2)
    taps /= 2 * taps.sum(1, keepdims=True) - 1
    weights = torch.from_numpy(taps).to(x.device, x.dtype, non_blocking=True)
    down, across = ((weights @ _bands(size, x.device, x.dtype)).view(-1, 1, size, size) for size in x.shape[2:])
    x.index_copy_(0, rows, down @ x.index_select(0, rows) @ across.mT)


@lru_cache(maxsize=8)
def _bands(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(_RADIUS + 1, size * size): row d marks the pixels at distance d from each pixel, reflected at the border."""
    bands = np.zeros((_RADIUS + 1, size, size))
    pixel, period = np.arange(size), max(2 * (size - 1), 1)
    for offset in range(-_RADIUS, _RADIUS + 1):
        place = (pixel + offset) % period
        bands[abs(offset), pixel, np.minimum(place, period - place)] += 1
    return torch.from_numpy(bands.reshape(_RADIUS + 1, -1)).to(device, dtype)
