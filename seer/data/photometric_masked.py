"""Colour, blur and normalisation with the same work for every crop, compiled to one call a resolution, for GPUs.

What does not apply to a crop is an identity: a step with factor 1, a kernel with one tap, an old value selected. So no
shape and no branch depends on a value, the host never waits for the device, and a batch costs one copy of coefficients
and one call. The arithmetic is that of `seer.data.photometric`, which on a CPU is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from seer.data import photometric_operations as operations
from seer.data.photometric_parameters import COLUMNS, GRAYSCALE, HUE, JITTER, SIGMA, PhotometricSpec

# Columns of the coefficients: the six steps, the turn of the hue, two gates, the blur's taps.
_STEPS = slice(0, 18)
_TURN, _JITTERED, _GREY = 18, 19, 20
_TAPS = slice(21, 21 + operations.TAPS)

Chain = Callable[[Tensor, Tensor, tuple[Tensor, Tensor], PhotometricSpec], Tensor]


def coefficients(parameters: Tensor, dtype: torch.dtype) -> Tensor:
    """What `chain` multiplies with: (M, P) of `photometric_parameters` -> (M, 28), on the CPU, in one pass."""
    numbers = parameters.numpy()
    steps = operations.jitter_steps(numbers).reshape(-1, 18)
    gates = numbers[:, [HUE, JITTER, GRAYSCALE]]
    return torch.from_numpy(np.concatenate([steps, gates, operations.blur_taps(numbers[:, SIGMA])], axis=1)).to(dtype)


def chain(crops_u8: Tensor, numbers: Tensor, bands: tuple[Tensor, Tensor], spec: PhotometricSpec) -> Tensor:
    """The device's part: fit for `torch.compile(fullgraph=True)`.

    Args:
        crops_u8: (M, H, W, 3) uint8.
        numbers: (M, 28) of `coefficients`, in the dtype of the result.
        bands: `photometric_operations.bands` of H and of W.
        spec: what it never does is left out of the graph.
    """
    x = operations.to_planes(crops_u8, numbers.dtype)
    steps = numbers[:, _STEPS].reshape(-1, 6, 3)
    if spec.jitter_probability > 0:
        for step in range(3):
            operations.blend(x, steps[:, step])
        if spec.hue != 0:
            turned = [torch.empty_like(plane, memory_format=torch.contiguous_format) for plane in x.unbind(1)]
            operations.turn_hue(x.unbind(1), numbers[:, _TURN], out=turned)
            # Selected: no turn is not the identity by a rounding.
            x = torch.where(_gate(numbers, _JITTERED), torch.stack(turned, 1), x)
        for step in range(3):
            operations.blend(x, steps[:, 3 + step])
    if spec.grayscale_probability > 0:
        x = torch.where(_gate(numbers, _GREY), operations.luma(x)[:, None], x)
    if spec.blur_probability > 0:
        x = operations.blur(x, numbers[:, _TAPS], *bands)
    operations.normalise(x)
    return x


def _gate(numbers: Tensor, column: int) -> Tensor:
    return numbers[:, column, None, None, None] > 0


@torch.no_grad()
def photometric_masked(
    crops_u8: Tensor,
    parameters: Tensor,
    spec: PhotometricSpec,
    dtype: torch.dtype = torch.float32,
    *,
    chain: Chain = chain,
) -> Tensor:
    """As `seer.data.photometric.photometric`, equal to a few roundings.

    Args:
        chain: `chain`, or what a compiler made of it.

    Returns:
        (M, 3, H, W), contiguous.
    """
    device, (_, height, width, _) = crops_u8.device, crops_u8.shape
    numbers = coefficients(parameters, dtype)
    if device.type == "cuda":
        numbers = numbers.pin_memory().to(device, non_blocking=True)
    bands = operations.bands(height, device, dtype), operations.bands(width, device, dtype)
    # One state of autocast and autograd for all callers: another one would compile anew.
    with torch.autocast(device.type, enabled=False):
        return chain(crops_u8, numbers, bands, spec)


def compiled_photometric(
    shapes: Iterable[tuple[int, int, int, int]], spec: PhotometricSpec, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """`photometric_masked` compiled for the shapes (M, H, W, 3) that will come: (crops, parameters) -> float crops.

    Each shape is compiled and run here, so that what a machine lacks is met before a run begins.

    Raises:
        Exception: of any type, by torch's compiler or Triton; `photometric` does the same without them.
    """
    compiled = torch.compile(chain, fullgraph=True, dynamic=False)
    run = partial(photometric_masked, spec=spec, dtype=dtype, chain=compiled)
    for shape in shapes:
        found = run(torch.zeros(shape, dtype=torch.uint8, device=device), torch.zeros(shape[0], COLUMNS))
        found[0, 0, 0, 0].item()  # waits for the device: a failed launch is told here
    return run
