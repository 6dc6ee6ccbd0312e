"""What an objective's forward gives to the step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """The loss to go backward from, and what is worth watching.

    Attributes:
        loss: scalar with a graph, at least float32: the mean over this rank's images (gradients are averaged over
            ranks).
        figures: detached scalars on the device, by name; reading one waits for the device, so that is left to log
            steps.
    """

    loss: Tensor
    figures: dict[str, Tensor]
