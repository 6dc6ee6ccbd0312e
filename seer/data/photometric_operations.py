"""The arithmetic of colour and blur, shared by the drivers `seer.data.photometric` and `photometric_masked`.

Brightness, contrast and saturation are one fused step, clamp(f x + a g + b mean(g), 0, 1) with g the luma: three of
them before the hue and three after it give all 24 orders, where what is missing is the identity f = 1, a = b = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seer.data.crops import MEAN, STD
from seer.data.photometric_parameters import CONTRAST, HUE, JITTER, ORDER, ORDERS, SATURATION

# Luma of ITU-R 601.
_LUMA = (0.2989, 0.587, 0.114)
_RADIUS = 6  # three standard deviations of the strongest blur
TAPS = _RADIUS + 1
_NO_BLUR = 1e-3  # pixels: its kernel is exactly 1 in the middle and 0 elsewhere

# Where hue stands in each order, and the operations before and after it (padded with -1: nothing).
_HUE_PLACE = np.array([order.index(HUE) for order in ORDERS])
_BEFORE = np.array([(*order[: order.index(HUE)], -1, -1, -1)[:3] for order in ORDERS])
_AFTER = np.array([(*order[order.index(HUE) + 1 :], -1, -1, -1)[:3] for order in ORDERS])


def before_hue(numbers: NDArray[np.float32]) -> NDArray[np.int64]:
    """(M,) how many operations come before the hue, -1 without jitter; (M, P) of `photometric_parameters`."""
    place: NDArray[np.int64] = np.where(numbers[:, JITTER] > 0, _HUE_PLACE[numbers[:, ORDER].astype(np.int64)], -1)
    return place


def jitter_steps(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """(M, 6, 3) for three steps before and three after the hue: factor of x, of its luma, and of its mean luma."""
    order = numbers[:, ORDER].astype(np.int64)
    operations = np.concatenate([_BEFORE[order], _AFTER[order]], axis=1)
    operations[numbers[:, JITTER] == 0] = -1
    factors = np.take_along_axis(numbers, np.maximum(operations, 0), axis=1)
    factors[operations < 0] = 1
    rest = 1 - factors
    return np.stack([factors, rest * (operations == SATURATION), rest * (operations == CONTRAST)], -1)


def blur_taps(sigma: NDArray[np.float32]) -> NDArray[np.float64]:
    """(m,) standard deviations, pixels -> (m, TAPS) weights by distance; sigma 0 is the identity, exactly."""
    sigmas = np.maximum(sigma.astype(np.float64), _NO_BLUR)[:, None]
    taps: NDArray[np.float64] = np.exp(-0.5 * (np.arange(TAPS) / sigmas) ** 2)
    taps /= 2 * taps.sum(1, keepdims=True) - 1
    return taps


def to_planes(crops_u8: Tensor, dtype: torch.dtype) -> Tensor:
    """(m, H, W, 3) uint8 -> (m, 3, H, W) in [0, 1], contiguous."""
    return crops_u8.permute(0, 3, 1, 2).contiguous().to(dtype).mul_(1 / 255)


def luma(x: Tensor) -> Tensor:
    """(m, 3, H, W) -> (m, H, W)"""
    red, green, blue = _LUMA
    return (x[:, 0] * red).add_(x[:, 1], alpha=green).add_(x[:, 2], alpha=blue)


def blend(x: Tensor, steps: Tensor) -> None:
    """One of brightness, contrast, saturation for each crop, in place: x (m, 3, H, W), steps (m, 3)."""
    factor, of_luma, of_mean = steps[:, :, None, None].unbind(1)
    grey = luma(x)
    other = torch.addcmul(grey.mean((1, 2), keepdim=True) * of_mean, grey, of_luma)
    x.mul_(factor[:, None]).add_(other[:, None]).clamp_(0, 1)


def turn_hue(planes: Sequence[Tensor], turns: Tensor, out: Sequence[Tensor]) -> None:
    """Turns the hue in HSV: red, green and blue (m, H, W) in [0, 1], turns (m,) parts of the circle.

    With value and saturation kept, the largest and the smallest value of a pixel stay, and each channel is a trapezoid
    of the hue. Selection by weights of 0 and 1: `where` and boolean masks are several times slower on a CPU.

    Args:
        out: three planes that are written; the given ones do.
    """
    red, green, blue = planes
    low = torch.minimum(red, green)
    blue_lowest = low.clone().ge_(blue)
    red_lower = green.clone().ge_(red)
    low = torch.minimum(low, blue, out=low)
    chroma = torch.maximum(red, green)
    torch.maximum(chroma, blue, out=chroma).sub_(low)
    # Hue in sixths: 1 + (G-R) / chroma where blue is lowest, 3 + (B-G) / chroma for red, 5 + (R-B) / chroma for green.
    hue = torch.lerp(red - blue, blue - green, red_lower)
    hue.lerp_(green - red, blue_lowest).div_(chroma.clamp_min(torch.finfo(red.dtype).tiny))
    hue.add_(red_lower.mul_(-2).add_(4).addcmul_(red_lower, blue_lowest, value=-1))
    hue.mul_(1 / 6).add_((turns + 1 / 6)[:, None, None])
    hue.sub_(hue.floor()).mul_(6)
    trapezoid = blue_lowest
    for channel, (centre, sign, top) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        torch.sub(hue, centre, out=trapezoid)
        trapezoid.abs_().mul_(sign).add_(top).clamp_(0, 1)
        torch.addcmul(low, chroma, trapezoid, out=out[channel])


def blur(x: Tensor, taps: Tensor, bands_down: Tensor, bands_across: Tensor) -> Tensor:
    """Gaussian blur of (m, 3, H, W) by taps (m, TAPS) and `bands` of H and W, along each axis by a banded matrix.

    At the sizes of crops a product with a mostly empty matrix beats passes over the image, one for each of the 13 taps,
    and convolution with a kernel for each crop, on CPUs.
    """
    height, width = x.shape[2:]
    down = (taps @ bands_down).view(-1, 1, height, height)
    across = (taps @ bands_across).view(-1, 1, width, width)
    return down @ x @ across.mT


@lru_cache(maxsize=8)
def bands(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(TAPS, size * size): row d marks the pixels at distance d from each pixel, reflected at the border."""
    marks = np.zeros((TAPS, size, size))
    pixel, period = np.arange(size), max(2 * (size - 1), 1)
    for offset in range(-_RADIUS, _RADIUS + 1):
        place = (pixel + offset) % period
        marks[abs(offset), pixel, np.minimum(place, period - place)] += 1
    return torch.from_numpy(marks.reshape(TAPS, -1)).to(device, dtype)


def normalise(x: Tensor) -> None:
    """(m, 3, H, W) by ImageNet's mean and deviation, in place."""
    for channel, (mean, deviation) in enumerate(zip(MEAN, STD, strict=True)):
        x[:, channel].sub_(mean).mul_(1 / deviation)


def pixels_of(crops: Tensor) -> Tensor:
    """Normalised crops (M, 3, H, W) back to pixels, (M, H, W, 3) uint8 on the CPU."""
    mean, deviation = (torch.tensor(values, dtype=crops.dtype, device=crops.device) for values in (MEAN, STD))
    return (crops.permute(0, 2, 3, 1) * deviation + mean).mul(255).round().clamp(0, 255).to("cpu", torch.uint8)
