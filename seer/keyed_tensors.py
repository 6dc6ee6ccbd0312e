"""Initial values that are looked up by name, not drawn in turn.

A tensor's values depend on (seed, name, shape) alone: not on its device or type, on the order of the calls, or on what
else was drawn. A network built on the meta device, sharded or resumed therefore starts from
the same values as any other.
"""

import hashlib

import torch
from torch import Tensor

from seer.distributed import fill


def normal_(tensor: Tensor, std: float, *, seed: int, name: str) -> Tensor:
    """Fills a tensor in place from N(0, std^2) and returns it.

    Args:
        tensor: any shape, floating type, device and memory format; of one that is sharded over ranks each rank draws
            all values and keeps its own, so that they do not depend on the ranks and nothing is sent.
        std: standard deviation.
        seed: the run's seed.
        name: which tensor this is; other names get independent values.
    """
    return fill(tensor, _blank(tensor).normal_(0.0, std, generator=_generator(seed, name)))


def uniform_(tensor: Tensor, bound: float, *, seed: int, name: str) -> Tensor:
    """Fills a tensor in place from the uniform distribution on [-bound, bound); arguments as `normal_`."""
    return fill(tensor, _blank(tensor).uniform_(-bound, bound, generator=_generator(seed, name)))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little", signed=True))


def _blank(tensor: Tensor) -> Tensor:
    # float32 and contiguous on the CPU, whatever the tensor is: a float64 or bfloat16 network then has the same values,
    # rounded. The device is named because a default device may be set.
    return torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
