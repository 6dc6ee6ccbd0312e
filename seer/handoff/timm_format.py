"""Weights for timm: a safetensors file with timm's names, which says how to build the network and prepare images.

The backbone has timm's parameter names inside, so an export is a copy; what timm needs beside it is in `timm_snippet`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seer import __version__
from seer.backbones.regnet import RegNetY
from seer.data.crops import CROP_SHARE, MEAN, STD
from seer.errors import UserError
from seer.files import sync_file, sync_folder

_REQUIRED = ("depth", "w0", "wa", "wm", "group_width")


@dataclass(frozen=True)
class Exported:
    """What an exported file holds.

    `architecture`: name, depth, w0, wa, wm, group_width, and stem_stride, stage_strides where they are not 2.
    `preprocessing`: image_size, resize, crop_pct, interpolation, mean, std.
    `tensors`: by timm's names, on the CPU; float32, the BatchNorm counters int64.
    """

    architecture: dict[str, Any]
    preprocessing: dict[str, Any]
    tensors: dict[str, Tensor]


def export_timm(
    network: RegNetY, out: Path, *, image_size: int, step: int | None = None, extra: Mapping[str, str] | None = None
) -> Path:
    """Writes a backbone's weights for timm, whole or not at all.

    Args:
        network: the backbone, on any device but meta, in any floating type.
        out: the file to write; an older one is replaced.
        image_size: side in pixels of the square images that the features are meant for.
        step: training steps behind the weights.
        extra: further metadata; the keys written here win.

    Returns:
        `out`.

    Raises:
        UserError: `out` cannot be written.
    """
    architecture = network.architecture()
    metadata = {
        **(extra or {}),
        "format": "pt",
        "architecture": json.dumps(architecture),
        "preprocessing": json.dumps(_preprocessing(image_size)),
        "timm": timm_snippet(architecture, out.name),
        "seer_version": __version__,
    }
    if step is not None:
        metadata["step"] = str(step)
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}", f"there is no folder {out.parent}", f"mkdir -p '{out.parent}'")
    if out.is_dir():
        raise UserError(
            f"cannot write {out}", "it is a folder", f"name a file, for instance {out / 'regnety.safetensors'}"
        )
    _write_atomically({name: _plain(tensor) for name, tensor in network.state_dict().items()}, metadata, out)
    return out


def load_exported(file: Path) -> Exported:
    """Reads what `export_timm` wrote.

    Raises:
        UserError: no such file, no safetensors file, or one that does not say how its network is built, or says
            in damaged JSON how images are prepared.
    """
    if not file.is_file():
        raise UserError(
            f"no file {file}", "weights are one safetensors file", "make it with `seer export --format timm`"
        )
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            metadata = handle.metadata() or {}
            architecture, preprocessing = _architecture(metadata, file), _preprocessing_of(metadata, file)
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read {file} ({error})", "weights are one whole safetensors file", "export or copy it again"
        ) from error
    return Exported(architecture, preprocessing, tensors)


def timm_snippet(architecture: Mapping[str, Any], path: Path | str) -> str:
    """The lines of Python that load an exported file with timm, strictly.

    timm's regnety_002 with all five generating parameters replaced is any RegNetY. timm has no argument for strides
    other than 2, so they are set on the built network; they do not change its parameters.
    """
    a = architecture
    lines = [
        "import timm",
        "",
        f'model = timm.create_model("regnety_002", num_classes=0, depth={a["depth"]}, w0={a["w0"]}, wa={a["wa"]}, '
        f"wm={a['wm']}, group_size={a['group_width']}, checkpoint_path={str(path)!r})",
    ]
    if "stem_stride" in a:
        lines.append(f"model.stem.conv.stride = ({a['stem_stride']}, {a['stem_stride']})")
    if "stage_strides" in a:
        lines += [
            f"for stage, stride in zip((model.s1, model.s2, model.s3, model.s4), {tuple(a['stage_strides'])}):",
            "    stage.b1.conv2.conv.stride = stage.b1.downsample.conv.stride = (stride, stride)",
        ]
    return "\n".join([*lines, "model.eval()", ""])


def _preprocessing(image_size: int) -> dict[str, Any]:
    return {
        "image_size": image_size,
        "resize": round(image_size / CROP_SHARE),
        "crop_pct": CROP_SHARE,
        "interpolation": "bilinear",
        "mean": list(MEAN),
        "std": list(STD),
    }


def _plain(tensor: Tensor) -> Tensor:
    # A copy: safetensors refuses shared storage (running statistics can be views of one buffer) and channels_last.
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)


def _write_atomically(tensors: dict[str, Tensor], metadata: dict[str, str], out: Path) -> None:
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        try:
            partial.touch()
            mode = partial.stat().st_mode
            save_file(tensors, partial, metadata=metadata)
            partial.chmod(mode)  # safetensors makes files that only their owner can read
            sync_file(partial)
            os.replace(partial, out)
            sync_folder(out.parent)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {out} ({error})",
            "its folder must be writable and have room",
            "choose another file or free space",
        ) from error


def _architecture(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    try:
        architecture = json.loads(metadata.get("architecture", ""))
        complete = isinstance(architecture, dict) and all(key in architecture for key in _REQUIRED)
    except json.JSONDecodeError:
        complete = False
    if not complete:
        raise UserError(
            f"{file} does not say how its network is built",
            f"its metadata needs `architecture`: JSON with {', '.join(_REQUIRED)}",
            "use a file that `seer export --format timm` wrote",
        )
    return dict(architecture)


def _preprocessing_of(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    """How images are prepared; empty where the file does not say."""
    try:
        preprocessing = json.loads(metadata.get("preprocessing", "{}"))
    except json.JSONDecodeError:
        preprocessing = None
    if not isinstance(preprocessing, dict):
        raise UserError(
            f"{file} does not say how images are prepared",
            "`preprocessing` in its metadata is a JSON object",
            "use a file that `seer export --format timm` wrote",
        )
    return preprocessing
