"""Colour and blur against formulas written out for one crop in float64, in all 24 orders."""

from __future__ import annotations

import colorsys
from itertools import permutations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage, stats
from torch import Tensor

from seer.data.photometric import photometric
from seer.data.photometric_parameters import COLUMNS, DRAWS, PhotometricSpec, photometric_parameters

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
FloatImage = NDArray[np.float64]


def luma(x: FloatImage) -> FloatImage:
    return x @ np.array([0.2989, 0.587, 0.114])


def brightness(x: FloatImage, factor: float) -> FloatImage:
    return np.clip(factor * x, 0, 1)


def contrast(x: FloatImage, factor: float) -> FloatImage:
    return np.clip(factor * x + (1 - factor) * luma(x).mean(), 0, 1)


def saturation(x: FloatImage, factor: float) -> FloatImage:
    return np.clip(factor * x + (1 - factor) * luma(x)[..., None], 0, 1)


def hue(x: FloatImage, turn: float) -> FloatImage:
    def pixel(rgb: FloatImage) -> tuple[float, float, float]:
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        return colorsys.hsv_to_rgb((h + turn) % 1, s, v)

    return np.apply_along_axis(pixel, -1, x)


OPERATIONS = (brightness, contrast, saturation, hue)


def blur(x: FloatImage, sigma: float) -> FloatImage:
    for axis in (0, 1):
        x = ndimage.gaussian_filter1d(x, sigma, axis=axis, mode="mirror", radius=6)
    return x


def oracle(crop: NDArray[np.uint8], row: NDArray[np.float32]) -> FloatImage:
    """Columns: factors of brightness, contrast, saturation; turn of the hue; order; jitter; grayscale; sigma."""
    x = crop / 255.0
    if row[5]:
        for operation in list(permutations(range(4)))[int(row[4])]:
            x = OPERATIONS[operation](x, float(row[operation]))
    if row[6]:
        x = np.repeat(luma(x)[..., None], 3, -1)
    if row[7]:
        x = blur(x, float(row[7]))
    return ((x - MEAN) / STD).transpose(2, 0, 1)


def noise(count: int, height: int = 14, width: int | None = None, seed: int = 0) -> Tensor:
    shape = (count, height, width or height, 3)
    crops = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    crops[:, 0, :4] = [[0, 0, 0], [255, 255, 255], [90, 90, 90], [255, 0, 0]]  # no hue, no chroma, pure colour
    return torch.from_numpy(crops)


def rows(count: int, **columns: object) -> Tensor:
    names = ("brightness", "contrast", "saturation", "hue", "order", "jitter", "grayscale", "sigma")
    found = np.zeros((count, COLUMNS), np.float32)
    found[:, :3] = 1
    for name, values in columns.items():
        found[:, names.index(name)] = values
    return torch.from_numpy(found)


def difference(crops: Tensor, parameters: Tensor, dtype: torch.dtype = torch.float32) -> float:
    found = photometric(crops, parameters, PhotometricSpec(), dtype).numpy()
    expected = np.stack([oracle(crop, row) for crop, row in zip(crops.numpy(), parameters.numpy(), strict=True)])
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() * STD.min())


def test_nothing_on_is_normalisation_alone() -> None:
    assert difference(noise(3), rows(3)) < 1e-6


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
def test_each_operation_alone(operation: str) -> None:
    assert difference(noise(5), rows(5, jitter=1, **{operation: [0.0, 0.2, 0.7, 1.3, 1.8]})) < 1e-5


def test_hue_alone() -> None:
    turns = [-0.5, -0.2, -1 / 6, 0.0, 0.01, 1 / 3, 0.5]
    assert difference(noise(7), rows(7, jitter=1, hue=turns)) < 1e-5


def test_all_orders() -> None:
    parameters = rows(48, jitter=1, order=np.arange(48) % 24, brightness=1.4, contrast=0.6, saturation=1.7, hue=0.17)
    parameters[24:, :4] = torch.tensor([0.5, 1.6, 0.4, -0.31])
    crops = noise(1).expand(48, -1, -1, -1)
    assert difference(crops, parameters) < 1e-5
    assert difference(crops, parameters, torch.float64) < 1e-7
    # The orders do matter: clamping and the mean make 24 (not fewer) results.
    found = photometric(crops[:24], parameters[:24], PhotometricSpec(), torch.float64)
    assert len({tuple(np.round(crop.flatten()[:60].tolist(), 6)) for crop in found}) == 24


def test_jitter_off_leaves_the_factors_unused() -> None:
    crops = noise(4)
    parameters = rows(
        4, jitter=[0, 1, 0, 1], brightness=0.5, contrast=1.5, saturation=0.3, hue=0.2, order=[9, 3, 1, 20]
    )
    assert difference(crops, parameters) < 1e-5


def test_grayscale_of_some() -> None:
    parameters = rows(
        6, grayscale=[1, 0, 0, 1, 1, 0], jitter=[1, 1, 1, 0, 1, 0], contrast=0.4, order=[0, 5, 23, 7, 11, 2]
    )
    assert difference(noise(6), parameters) < 1e-5


@pytest.mark.parametrize("size", [7, 16, 33])
def test_blur_is_a_true_gaussian(size: int) -> None:
    sigma = [0.1, 0.3, 0.0, 0.9, 1.4, 2.0]
    assert difference(noise(6, size), rows(6, sigma=sigma)) < 1e-5
    assert difference(noise(6, size), rows(6, sigma=sigma), torch.float64) < 1e-7


def test_blur_of_crops_that_are_not_square_or_smaller_than_the_kernel() -> None:
    assert difference(noise(2, 12, 20), rows(2, sigma=[1.0, 1.7])) < 1e-5
    assert difference(noise(2, 4), rows(2, sigma=[1.0, 1.7])) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_chain_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several parts of several crops: rows come back to their places.
    monkeypatch.setattr("seer.data.photometric._VALUES_AT_ONCE", {"cpu": 7 * 3 * 14 * 14})
    uniforms = np.random.default_rng(4).random((60, DRAWS))
    parameters = torch.from_numpy(photometric_parameters(uniforms, PhotometricSpec(hue=0.5)))
    assert difference(noise(60), parameters, dtype) < (1e-5 if dtype == torch.float32 else 1e-7)


def test_layout_type_and_independence_of_surroundings() -> None:
    uniforms = np.random.default_rng(5).random((12, DRAWS))
    spec = PhotometricSpec()
    parameters, crops = torch.from_numpy(photometric_parameters(uniforms, spec)), noise(12)
    found = photometric(crops, parameters, spec)
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
    assert not found.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(photometric(crops, parameters, spec), found)
    assert photometric(crops[:0], parameters[:0], spec).shape == (0, 3, 14, 14)
    before = crops.clone(), parameters.clone()
    photometric(crops, parameters, spec)
    assert torch.equal(crops, before[0]) and torch.equal(parameters, before[1])


def test_no_hue_in_the_distribution_is_left_out() -> None:
    spec = PhotometricSpec(hue=0.0)
    parameters = torch.from_numpy(photometric_parameters(np.random.default_rng(6).random((30, DRAWS)), spec))
    found = photometric(noise(30), parameters, spec, torch.float64)
    assert torch.allclose(found, photometric(noise(30), parameters, PhotometricSpec(), torch.float64), atol=1e-9)


def test_statistics_of_the_parameters() -> None:
    spec = PhotometricSpec(brightness=0.8, contrast=0.4, saturation=1.5, hue=0.2)
    found = photometric_parameters(np.random.default_rng(0).random((20_000, DRAWS)), spec).astype(np.float64)
    assert found.shape == (20_000, COLUMNS)
    sigma = found[:, 7]
    for values, low, high in (
        (found[:, 0], 0.2, 1.8),
        (found[:, 1], 0.6, 1.4),
        (found[:, 2], 0.0, 2.5),
        (found[:, 3], -0.2, 0.2),
        (sigma[sigma > 0], 0.1, 2.0),
    ):
        assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-4
    assert stats.chisquare(np.bincount(found[:, 4].astype(int), minlength=24)).pvalue > 1e-4
    for share, values in ((0.8, found[:, 5]), (0.2, found[:, 6]), (0.5, sigma > 0)):
        assert abs(values.mean() - share) < 0.015
    assert np.abs(np.corrcoef(found.T) - np.eye(COLUMNS)).max() < 0.03
