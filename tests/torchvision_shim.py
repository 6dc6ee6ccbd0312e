"""Makes timm importable where torchvision's compiled operators do not fit the installed torch (a CPU-only torch)."""

import re
from importlib.util import find_spec
from pathlib import Path

import torch

_KEPT_ALIVE: list[torch.library.Library] = []


def make_torchvision_importable() -> None:
    """Call before `import timm`. Changes nothing where torchvision works or is not installed.

    timm imports torchvision, whose import registers fake kernels for operators that only its compiled library defines.
    Where that library cannot be loaded the import fails ("operator torchvision::nms does not exist"); empty definitions
    suffice, as nobody here calls the operators.
    """
    spec = find_spec("torchvision")
    if _KEPT_ALIVE or spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent
    for library in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
        return
    text = (folder / "_meta_registrations.py").read_text()
    definitions = torch.library.Library("torchvision", "DEF")
    for operator in sorted(set(re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"', text))):
        definitions.define(f"{operator}() -> ()")
    _KEPT_ALIVE.append(definitions)
