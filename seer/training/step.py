"""One training step, in the order that docs/architecture.md fixes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seer import distributed
from seer.build import Learner, Optimizer
from seer.data.photometric import photometric
from seer.data.photometric_parameters import PhotometricSpec
from seer.data.stream import Batch
from seer.objectives.outcome import Outcome
from seer.training.state import TrainState


@dataclass
class StepSettings:
    """What does not change during a run.

    Attributes:
        device: where the network lives.
        dtype: of the float crops: float32, or float64 under full double precision.
        autocast: the backbone's dtype under autocast, or None.
        channels_last: the memory format of crops and convolutions.
        photometric: colour and blur.
        average_statistics: whether running statistics are averaged over ranks.
    """

    device: torch.device
    dtype: torch.dtype
    autocast: torch.dtype | None
    channels_last: bool
    photometric: PhotometricSpec
    average_statistics: bool


def float_crops(batch: Batch, settings: StepSettings) -> list[Tensor]:
    """Crops on the device with their colours changed: a list of (crops x N, 3, H, W), one a resolution."""
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    return [
        photometric(
            crops.to(settings.device, non_blocking=True),
            parameters,  # on the host, where rows are sorted by operation without waiting for the device
            settings.photometric,
            dtype=settings.dtype,
        ).contiguous(memory_format=layout)
        for crops, parameters in zip(batch.crops, batch.photometric, strict=True)
    ]


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Before the step: it depends on no value of the device."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def train_step(state: TrainState, crops: list[Tensor], settings: StepSettings) -> Outcome:
    """Forward, backward and the update of everything, or of nothing where any value of any rank is not finite.

    Args:
        state: moved in place.
        crops: float crops, a list of (crops x N, 3, H, W), one a resolution, the large ones first.

    Returns:
        The objective's outcome: loss and figures, on the device, without host synchronisation.
    """
    learner, optimizer = state.learner, state.optimizer
    learner.train()
    state.statistics.remember()
    with torch.autocast(settings.device.type, dtype=settings.autocast, enabled=settings.autocast is not None):
        outcome: Outcome = learner(crops)
    optimizer.zero_grad(set_to_none=True)
    outcome.loss.backward()  # type: ignore[no-untyped-call]
    learner.objective.after_backward(state.step)
    finite = _everything_finite(outcome.loss, learner)
    optimizer.step(finite=finite)
    state.statistics.settle(finite, average=settings.average_statistics)
    learner.objective.after_step(finite, state.step)
    state.skipped_steps += ~finite
    state.step += 1
    state.batch_index += 1
    return outcome


@torch.no_grad()
def _everything_finite(loss: Tensor, learner: Learner) -> Tensor:
    """Whether loss and all gradients of all ranks are finite: a boolean scalar on the device, equal on all ranks."""
    gradients = [parameter.grad for parameter in learner.parameters() if parameter.grad is not None]
    bad = (~torch.isfinite(loss.detach())).to(torch.float32).reshape(1)
    # What torch's gradient scaler uses: one pass that scales by 1 and raises the flag where anything is not finite. It
    # is twenty times as fast on a CPU as norms (docs/LOG.md), and a large but finite gradient cannot overflow in it.
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, bad, torch.ones_like(bad))
    return distributed.all_finite(bad == 0)
