"""RegNetY, the family by its generating parameters (Radosavovic et al. 2020, arXiv:2003.13678; SEER: arXiv:2103.01988).

Parameters carry timm's names and the operations follow timm's order, so that a copy of the weights in timm gives the
same features to the last bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seer.backbones.initial_values import initialise
from seer.errors import UserError, closest

STEM_WIDTH = 32
STAGES = 4

FAMILY: dict[str, tuple[int, int, float, float, int]] = {
    # name: depth, w0, wa, wm, group width
    "tiny": (5, 32, 45.0, 2.0, 16),
    "200mf": (13, 24, 36.44, 2.49, 8),
    "400mf": (16, 48, 27.89, 2.09, 8),
    "600mf": (15, 48, 32.54, 2.32, 16),
    "800mf": (14, 56, 38.84, 2.4, 16),
    "1.6gf": (27, 48, 20.71, 2.65, 24),
    "3.2gf": (21, 80, 42.63, 2.66, 24),
    "4gf": (22, 96, 31.41, 2.24, 64),
    "6.4gf": (25, 112, 33.22, 2.27, 72),
    "8gf": (17, 192, 76.82, 2.19, 56),
    "12gf": (19, 168, 73.36, 2.37, 112),
    "16gf": (18, 200, 106.23, 2.48, 112),
    "32gf": (20, 232, 115.89, 2.53, 232),
    "64gf": (20, 352, 147.48, 2.4, 328),
    "128gf": (27, 456, 160.83, 2.52, 264),
    "256gf": (27, 640, 230.83, 2.53, 373),
    "256gf_cv": (27, 640, 124.47, 2.04, 848),  # what ClassyVision calls regnet_y_256gf; SEER's is the row above
    "10b": (27, 1744, 620.83, 2.52, 1010),
}
"""The generating parameters of each member: `regnet_shape(*FAMILY[name])`."""


@dataclass(frozen=True)
class RegNetShape:
    """What `regnet_shape` found: one width, depth and group width a stage, and the parameters they came from."""

    depth: int
    w0: int
    wa: float
    wm: float
    group_width: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    group_widths: tuple[int, ...]

    @property
    def parameters(self) -> tuple[int, int, float, float, int]:
        """(depth, w0, wa, wm, group_width)."""
        return self.depth, self.w0, self.wa, self.wm, self.group_width

    @property
    def name(self) -> str:
        """The family's name for these parameters, or "custom"."""
        return next((name for name, parameters in FAMILY.items() if parameters == self.parameters), "custom")


def regnet_shape(depth: int, w0: int, wa: float, wm: float, group_width: int) -> RegNetShape:
    """Widths and depths from the five generating parameters (arXiv:2003.13678, equations 2-4; rounding as in pycls).

    Block j has the continuous width u = w0 + wa*j, snapped to 8*round(w0*wm^s/8) with s = round(ln(u/w0)/ln wm); runs
    of equal width are the stages, whose widths then become multiples of the group width. All rounding is half to even.

    Args:
        depth: number of blocks.
        w0: initial width, a multiple of 8.
        wa: slope of the widths, at least 0.
        wm: ratio between the widths of neighbouring stages, above 1.
        group_width: channels a group of the 3x3 convolutions; a stage narrower than it has one group.

    Raises:
        UserError: parameters that give no RegNet of four stages.
    """
    given = f"RegNet with depth {depth}, w0 {w0}, wa {wa}, wm {wm}, group width {group_width}"
    if depth < 1 or group_width < 1 or wa < 0 or wm <= 1:
        raise UserError(given, "depth and group width are at least 1, wa at least 0, wm above 1", "mend that parameter")
    if w0 < 8 or w0 % 8:
        raise UserError(given, "w0 is a positive multiple of 8", f"use w0 {max(8, 8 * round(w0 / 8))}")
    # In float32, operation by operation as timm: every published member is the same in float64, but where a rounding is
    # a tie (wm 2.25 and wa = w0/2, say) timm would build another network and refuse our weights.
    continuous = torch.arange(depth, dtype=torch.float32, device="cpu") * wa + w0
    exponents = torch.round(torch.log(continuous / w0) / math.log(wm))
    block_widths = torch.round(w0 * torch.pow(wm, exponents) / 8) * 8
    stages = [(width, len(list(run))) for width, run in itertools.groupby(block_widths.int().tolist())]
    if len(stages) != STAGES:
        raise UserError(
            f"{given} has {len(stages)} stages (widths {', '.join(str(width) for width, _ in stages)})",
            f"a RegNet has {STAGES} stages",
            "raise wa or depth, or lower wm, for more stages; the opposite for fewer",
        )
    group_widths = [min(group_width, width) for width, _ in stages]
    widths = [round(width / group) * group for (width, _), group in zip(stages, group_widths, strict=True)]
    depths = [blocks for _, blocks in stages]
    return RegNetShape(depth, w0, wa, wm, group_width, tuple(widths), tuple(depths), tuple(group_widths))


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d on a list of resolutions: one call for all, so that ranks can exchange all statistics at once.

    Each resolution is normalised by itself; running statistics are updated once for each, in the order of the list.
    """

    def forward(self, maps: list[Tensor]) -> list[Tensor]:  # type: ignore[override]  # a list instead of a tensor
        return [nn.BatchNorm2d.forward(self, x) for x in maps]


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm, and a ReLU unless told otherwise, on a list of resolutions."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn = BatchNorm(outputs)
        self.relu = relu

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = self.bn([self.conv(x) for x in maps])
        return [F.relu(x, inplace=True) for x in maps] if self.relu else maps


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from all channels' means, on a list of resolutions."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [x * self._gate(x) for x in maps]

    def _gate(self, x: Tensor) -> Tensor:
        # The mean, to the last bit, but its backward spreads a view where that of mean writes a full-sized tensor.
        means = x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3])
        hidden = F.relu(self.fc1(means), inplace=True)
        return torch.sigmoid(self.fc2(hidden))


class Stem(nn.Module):
    """3x3 convolution, BatchNorm, ReLU, on a list of resolutions."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride, padding=1, bias=False)
        self.bn = BatchNorm(width)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [F.relu(x, inplace=True) for x in self.bn([self.conv(x) for x in images])]


class Block(nn.Module):
    """A residual block on a list of resolutions: all of them in one call, so that a sharded block is gathered once."""

    def __init__(self, inputs: int, width: int, group_width: int, stride: int, *, first: bool) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, width, 1)
        self.conv2 = ConvNorm(width, width, 3, stride=stride, groups=width // group_width)
        # A quarter of the block's input width, half to even: 746 gives 186, and published weights have 186.
        self.se = SqueezeExcitation(width, round(0.25 * inputs))
        self.conv3 = ConvNorm(width, width, 1, relu=False)
        self.downsample = ConvNorm(inputs, width, 1, stride=stride, relu=False) if first else nn.Identity()

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        residuals = self.conv3(self.se(self.conv2(self.conv1(features))))
        shortcuts = self.downsample(features)
        return [F.relu(a + b, inplace=True) for a, b in zip(residuals, shortcuts, strict=True)]


class RegNetY(nn.Module):
    """A RegNetY without classifier: images to globally averaged features.

    Initialised with seed 0 (`initial_values.initialise`) unless it is built on the meta device.

    Args:
        shape: from `regnet_shape`.
        stem_stride: stride of the stem; 1 for very small images.
        stage_strides: stride of each stage's first block.
        device, dtype: of parameters and statistics; torch's defaults if None.

    Raises:
        UserError: strides that are not four positive numbers.
    """

    def __init__(
        self,
        shape: RegNetShape,
        *,
        stem_stride: int = 2,
        stage_strides: Sequence[int] = (2, 2, 2, 2),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(stage_strides) != STAGES or min(stem_stride, *stage_strides) < 1:
            raise UserError(
                f"stem stride {stem_stride}, stage strides {list(stage_strides)}",
                f"one stride for the stem and one for each of the {STAGES} stages, each at least 1",
                "use for instance stem stride 2, stage strides 1,2,2,2",
            )
        self.shape = shape
        self.stem_stride, self.stage_strides = stem_stride, tuple(stage_strides)
        self.feature_dim = shape.widths[-1]
        target = torch.get_default_device() if device is None else torch.device(device)
        # Built on meta first: torch's own initial values, which nobody would see, are not drawn.
        with torch.device("meta"):
            self.stem = Stem(STEM_WIDTH, stem_stride)
            inputs = STEM_WIDTH
            for index in range(STAGES):
                self.add_module(f"s{index + 1}", self._stage(index, inputs))
                inputs = shape.widths[index]
        self.to(dtype=dtype or torch.get_default_dtype())
        if target.type != "meta":
            self.to_empty(device=target)
            initialise(self)

    def _stage(self, index: int, inputs: int) -> nn.ModuleDict:
        width, group_width = self.shape.widths[index], self.shape.group_widths[index]
        blocks = nn.ModuleDict({"b1": Block(inputs, width, group_width, self.stage_strides[index], first=True)})
        for number in range(2, self.shape.depths[index] + 1):
            blocks[f"b{number}"] = Block(width, width, group_width, 1, first=False)
        return blocks

    @overload
    def forward(self, images: Tensor) -> Tensor: ...

    @overload
    def forward(self, images: Sequence[Tensor]) -> list[Tensor]: ...

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Features of images, (N, 3, H, W) to (N, feature_dim), of one resolution or of a list of them.

        A list gives a list. Each block takes all resolutions before the next block begins; BatchNorm sees each
        resolution by itself and updates its running statistics once for each, in the order of the list.
        """
        if isinstance(images, Tensor):
            return self._features([images])[0]
        return self._features(list(images))

    def _features(self, maps: list[Tensor]) -> list[Tensor]:
        for _, unit in self.units():
            maps = unit(maps)
        return [F.adaptive_avg_pool2d(x, 1).flatten(1) for x in maps]

    def units(self) -> list[tuple[str, nn.Module]]:
        """What is sharded, checkpointed and compiled as one: the stem and each block, by name, in forward order."""
        units: list[tuple[str, nn.Module]] = [("stem", self.stem)]
        for index in range(1, STAGES + 1):
            stage = self.get_submodule(f"s{index}")
            units += [(f"s{index}.{name}", block) for name, block in stage.named_children()]
        return units

    def architecture(self) -> dict[str, str | int | float | list[int]]:
        """What rebuilds this network: name, depth, w0, wa, wm, group_width, and the strides where they are not 2."""
        depth, w0, wa, wm, group_width = self.shape.parameters
        described: dict[str, str | int | float | list[int]] = {
            "name": self.shape.name,
            "depth": depth,
            "w0": w0,
            "wa": wa,
            "wm": wm,
            "group_width": group_width,
        }
        if self.stem_stride != 2:
            described["stem_stride"] = self.stem_stride
        if self.stage_strides != (2,) * STAGES:
            described["stage_strides"] = list(self.stage_strides)
        return described


def regnety(name: str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> RegNetY:
    """A member of the family (`FAMILY`), initialised with seed 0 unless `device` is meta.

    Raises:
        UserError: no member has this name.
    """
    if name not in FAMILY:
        raise UserError(f"backbone {name!r}", "a RegNetY is named by its multiply-adds", closest(name, FAMILY))
    return RegNetY(regnet_shape(*FAMILY[name]), device=device, dtype=dtype)
