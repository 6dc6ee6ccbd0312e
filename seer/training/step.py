"""One training step, in the order that docs/architecture.md fixes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from seer import build, distributed
from seer.build import Learner, Optimizer
from seer.config import TrainConfig
from seer.data.stream import Batch
from seer.objectives.outcome import Outcome
from seer.parallel.strategies import average_replicated_gradients
from seer.training.state import TrainState


@dataclass
class StepSettings:
    """What does not change during a run.

    Attributes:
        device: where the network lives.
        autocast: the backbone's dtype under autocast, or None.
        channels_last: the memory format of crops and convolutions.
        photometric: colour and blur of uint8 crops on the device by parameters on the host (`build.photometric_of`).
        average_statistics: whether running statistics are averaged over ranks (BatchNorm sees its own rank only).
    """

    device: torch.device
    autocast: torch.dtype | None
    channels_last: bool
    photometric: Callable[[Tensor, Tensor], Tensor]
    average_statistics: bool


def step_settings(config: TrainConfig, device: torch.device) -> StepSettings:
    """What a configuration says of a step on a device; on a GPU colour and blur are compiled here."""
    _, autocast = build.precision_of(config)
    return StepSettings(
        device=device,
        autocast=autocast,
        channels_last=build.channels_last(device),
        photometric=build.photometric_of(config, device),
        average_statistics=not config.parallel.sync_batchnorm,
    )


def float_crops(batch: Batch, settings: StepSettings) -> list[Tensor]:
    """Crops on the device with their colours changed: a list of (crops x N, 3, H, W), one a resolution."""
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    return [
        settings.photometric(crops.to(settings.device, non_blocking=True), parameters).contiguous(memory_format=layout)
        for crops, parameters in zip(batch.crops, batch.photometric, strict=True)
    ]


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Before the step: it depends on no value of the device."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


@dataclass(frozen=True)
class StepOutcome:
    """What a step tells, equal on all ranks; scalars on the device, so that nobody waits for it.

    Attributes:
        figures: the objective's, over all ranks.
        worker_deaths: data workers of all ranks that were replaced since the run was started or resumed.
        requests: (2,) how many ranks asked to stop, and how many of them to be queued again.
    """

    figures: dict[str, Tensor]
    worker_deaths: Tensor
    requests: Tensor


def train_step(
    state: TrainState,
    crops: list[Tensor],
    settings: StepSettings,
    *,
    bad_samples: int = 0,
    worker_deaths: int = 0,
    requests: tuple[bool, bool] = (False, False),
) -> StepOutcome:
    """Forward, backward and the update of everything, or of nothing where any value of any rank is not finite.

    Args:
        state: moved in place.
        crops: float crops of this rank, a list of (crops x N, 3, H, W), one a resolution, the large ones first.
        bad_samples: images of this rank's part that were replaced.
        worker_deaths: data workers of this rank that were replaced so far.
        requests: whether this rank asks to stop, and to be queued again.
    """
    learner, optimizer = state.learner, state.optimizer
    learner.train()
    state.statistics.remember()
    with torch.autocast(settings.device.type, dtype=settings.autocast, enabled=settings.autocast is not None):
        outcome: Outcome = state.forward(crops)
    optimizer.zero_grad(set_to_none=True)
    outcome.loss.backward()  # type: ignore[no-untyped-call]
    average_replicated_gradients(state.replicated)
    learner.objective.after_backward(state.step)
    finite, bad, deaths, agreed, shares, square_norms = _agree(outcome, state, (bad_samples, worker_deaths), requests)
    optimizer.step(finite=finite, square_norms=square_norms)
    state.statistics.settle(finite, average=settings.average_statistics)
    learner.objective.after_step(finite, state.step)
    state.skipped_steps += ~finite
    state.bad_samples += bad
    state.step += 1
    state.batch_index += 1
    return StepOutcome(outcome.figures(shares), deaths, agreed)


@torch.no_grad()
def _agree(
    outcome: Outcome, state: TrainState, counts: tuple[int, int], requests: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All that ranks tell each other about a step, in one all-reduce.

    Returns:
        Whether loss and all gradients of all ranks are finite, a boolean scalar; replaced images and replaced workers,
        int64 scalars; requests (2,); the sums of the outcome's shares; those of the optimizer's square norms.
    """
    shares, norms = outcome.shares, state.optimizer.partial_square_norms()
    told = distributed.from_host([*map(float, (*counts, *requests))], shares.device, shares.dtype)
    not_finite = _not_finite(outcome.loss, state.learner).to(shares.dtype)
    sums = distributed.sum_over_ranks(torch.cat([not_finite, told, shares, norms.to(shares.dtype)]))
    not_finite, bad, deaths, agreed, shares, norms = torch.split(sums, [1, 1, 1, 2, len(shares), len(norms)])
    return not_finite[0] == 0, bad[0].to(torch.int64), deaths[0].to(torch.int64), agreed, shares, norms


def _not_finite(loss: Tensor, learner: Learner) -> Tensor:
    """(1,) float32 on the device: 0 where this rank's loss and gradients are finite."""
    gradients = [distributed.local(parameter.grad) for parameter in learner.parameters() if parameter.grad is not None]
    bad = (~torch.isfinite(loss.detach())).to(torch.float32).reshape(1)
    # What torch's gradient scaler uses: one pass that scales by 1 and raises the flag where anything is not finite. It
    # is twenty times as fast on a CPU as norms (docs/LOG.md), and a large but finite gradient cannot overflow in it.
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, bad, torch.ones_like(bad))
    return bad
