"""What an objective's forward gives to the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """The loss to go backward from, and what is worth watching.

    Attributes:
        loss: scalar with a graph, at least float32: the mean over this rank's images (gradients are averaged over
            ranks).
        shares: (n,) detached, at least float32: what this rank adds to the sums that the figures are computed from. The
            step sums them over ranks together with other things, so that figures cost no collective of their own.
        figures: from those sums to detached scalars on the device, by name, ``loss`` among them; reading one waits for
            the device, so that is left to log steps.
    """

    loss: Tensor
    shares: Tensor
    figures: Callable[[Tensor], dict[str, Tensor]]
