"""Colour, blur and normalisation of uint8 crops, batched: each operation on the crops that it applies to.

The operations are those of SwAV's augmentation (Caron et al. 2020, src/multicropdataset.py) in floating point instead
of 8 bits: brightness, contrast, saturation and hue in each crop's own random order, grayscale, Gaussian blur. This
driver computes no crop for nothing, which is what a CPU needs (benchmarks/bench_photometric.py measures it against
Pillow's chain); `seer.data.photometric_masked` does the same arithmetic in one compiled call for GPUs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from seer.data import photometric_operations as operations
from seer.data.photometric_parameters import GRAYSCALE, HUE, SIGMA, PhotometricSpec

# Values worked on together: on a CPU few enough for its caches, many enough that the calls themselves cost little.
_VALUES_AT_ONCE = {"cpu": 2**19}
_VALUES_AT_ONCE_ELSEWHERE = 2**27


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
    before = operations.before_hue(numbers)
    rows = np.argsort(-before, kind="stable")
    numbers, before = numbers[rows], before[rows]
    steps = torch.from_numpy(operations.jitter_steps(numbers)).to(device, dtype, non_blocking=True)
    places = torch.from_numpy(rows).to(device, non_blocking=True)

    out = torch.empty(crops_u8.shape, device=device, dtype=dtype)
    at_once = _VALUES_AT_ONCE.get(device.type, _VALUES_AT_ONCE_ELSEWHERE)
    size = max(1, at_once // (3 * height * width))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        x = operations.to_planes(crops_u8.index_select(0, places[part]), dtype)
        _jitter(x, steps[part], numbers[part, HUE], before[part], turn=spec.hue != 0)
        _grayscale(x, numbers[part, GRAYSCALE])
        with torch.autocast(device.type, enabled=False):  # the blur's products would become bf16
            _blur(x, numbers[part, SIGMA])
        operations.normalise(x)
        # Interleaved first: index_copy of a permuted tensor is twice as slow as both.
        out.index_copy_(0, places[part], x.permute(0, 2, 3, 1).contiguous())
    return out.permute(0, 3, 1, 2)


def _jitter(x: Tensor, steps: Tensor, turns: np.ndarray, before: np.ndarray, *, turn: bool) -> None:
    """Colour jitter in place; rows are sorted by falling `before` (operations before hue; -1: no jitter)."""
    jittered = int((before >= 0).sum())
    for step in range(3):
        _blend(x, steps[:, step], slice(int((before > step).sum())))
    if turn and jittered:
        planes = x[:jittered].unbind(1)
        on_device = torch.from_numpy(turns[:jittered]).to(x.device, x.dtype, non_blocking=True)
        operations.turn_hue(planes, on_device, out=planes)
    for step in range(3):
        _blend(x, steps[:, 3 + step], slice(int((before > 2 - step).sum()), jittered))


def _blend(x: Tensor, steps: Tensor, rows: slice) -> None:
    if len(x[rows]):
        operations.blend(x[rows], steps[rows])


def _grayscale(x: Tensor, on: np.ndarray) -> None:
    """Luma in all three channels where `on`, in place."""
    rows = torch.from_numpy(np.flatnonzero(on)).to(x.device, non_blocking=True)
    if len(rows):
        x.index_copy_(0, rows, operations.luma(x.index_select(0, rows))[:, None].expand(-1, 3, -1, -1))


def _blur(x: Tensor, sigma: np.ndarray) -> None:
    """In place where sigma (m,) > 0."""
    on = np.flatnonzero(sigma > 0)
    if len(on) == 0:
        return
    rows = torch.from_numpy(on).to(x.device, non_blocking=True)
    taps = torch.from_numpy(operations.blur_taps(sigma[on])).to(x.device, x.dtype, non_blocking=True)
    down, across = (operations.bands(size, x.device, x.dtype) for size in x.shape[2:])
    x.index_copy_(0, rows, operations.blur(x.index_select(0, rows), taps, down, across))
