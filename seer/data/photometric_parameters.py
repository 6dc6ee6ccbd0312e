"""What colour and blur each crop gets: numbers only (numpy; free of torch). `seer.data.photometric` applies them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

# Columns of the parameters.
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, JITTER, GRAYSCALE, SIGMA = range(8)
COLUMNS = 8
# Uniform numbers a crop needs: four strengths, order, three gates, sigma.
DRAWS = 9

# ORDERS[i]: the four operations (by their column) in the order in which order i applies them.
ORDERS: tuple[tuple[int, ...], ...] = tuple(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))


@dataclass(frozen=True)
class PhotometricSpec:
    """Distribution of colour and blur; the defaults are SwAV's (Caron et al. 2020).

    Attributes:
        jitter_probability: share of crops whose brightness, contrast, saturation and hue change, in random order.
        brightness, contrast, saturation: factors are uniform in [max(0, 1 - x), 1 + x].
        hue: turned by a uniform part of the colour circle in [-x, x].
        grayscale_probability: share of crops that lose their colour.
        blur_probability: share of crops that are blurred.
        blur_min_sigma, blur_max_sigma: range of the Gaussian's standard deviation, pixels.
    """

    jitter_probability: float = 0.8
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    grayscale_probability: float = 0.2
    blur_probability: float = 0.5
    blur_min_sigma: float = 0.1
    blur_max_sigma: float = 2.0


def photometric_parameters(uniforms: NDArray[np.float64], spec: PhotometricSpec) -> NDArray[np.float32]:
    """Parameters of M crops.

    Args:
        uniforms: (M, DRAWS) float64 in [0, 1).

    Returns:
        (M, COLUMNS) float32: factors of brightness, contrast, saturation; turn of the hue; which of ORDERS; jitter on;
        grayscale on; sigma of the blur, 0 for none.
    """
    found = np.empty((len(uniforms), COLUMNS), np.float32)
    for column, strength in ((BRIGHTNESS, spec.brightness), (CONTRAST, spec.contrast), (SATURATION, spec.saturation)):
        low, high = max(0.0, 1 - strength), 1 + strength
        found[:, column] = low + (high - low) * uniforms[:, column]
    found[:, HUE] = (2 * uniforms[:, HUE] - 1) * spec.hue
    found[:, ORDER] = np.floor(uniforms[:, 4] * len(ORDERS))
    found[:, JITTER] = uniforms[:, 5] < spec.jitter_probability
    found[:, GRAYSCALE] = uniforms[:, 6] < spec.grayscale_probability
    sigma = spec.blur_min_sigma + (spec.blur_max_sigma - spec.blur_min_sigma) * uniforms[:, 8]
    found[:, SIGMA] = np.where(uniforms[:, 7] < spec.blur_probability, sigma, 0)
    return found
