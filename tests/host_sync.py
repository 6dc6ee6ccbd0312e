"""Finds, on a CPU, what would make the host wait for a GPU."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class NoHostSync(TorchDispatchMode):
    """Within it, reading a tensor's value (`.item()`, `bool()`, indexing by a device scalar or a mask) is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))
