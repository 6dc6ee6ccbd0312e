"""SwAV's published crops (src/multicropdataset.py of its repository), written anew: all by Pillow, one at a time."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from seer.data.crops import MEAN, STD, CropSpec

Operation = Callable[[Image.Image, float], Image.Image]


def brightness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(factor)


def hue(image: Image.Image, turn: float) -> Image.Image:
    old, colour, value = image.convert("HSV").split()
    turned = (np.asarray(old, np.int16) + int(turn * 255)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), colour, value)).convert("RGB")


def finished(
    crop: Image.Image, operations: Sequence[tuple[Operation, float]], *, grey: bool, sigma: float | None
) -> Tensor:
    """A crop with its colours changed, blurred, as normalised floats."""
    for operation, amount in operations:
        crop = operation(crop, amount)
    if grey:
        one = crop.convert("L")
        crop = Image.merge("RGB", (one, one, one))
    if sigma is not None:
        crop = crop.filter(ImageFilter.GaussianBlur(sigma))
    tensor = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous().float().div(255)
    return tensor.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


def random_resized_crop(image: Image.Image, size: int, low: float, high: float) -> Image.Image:
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(low, high)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = random.randint(0, width - w), random.randint(0, height - h)
    return image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BILINEAR)


def random_crop(image: Image.Image, spec: CropSpec) -> Tensor:
    crop = random_resized_crop(image, spec.size, spec.min_area, spec.max_area)
    if random.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    operations: list[tuple[Operation, float]] = []
    if random.random() < 0.8:
        factors = [(operation, random.uniform(0.2, 1.8)) for operation in (brightness, contrast, saturation)]
        operations = random.sample([*factors, (hue, random.uniform(-0.2, 0.2))], 4)
    grey = random.random() < 0.2
    return finished(crop, operations, grey=grey, sigma=random.uniform(0.1, 2.0) if random.random() < 0.5 else None)


def crops_of(data: bytes, specs: Sequence[CropSpec]) -> list[Tensor]:
    """All crops of an encoded image, (3, S, S) float32 each."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return [random_crop(image, spec) for spec in specs for _ in range(spec.count)]
