"""The running statistics of all BatchNorms of a network, as views of one flat buffer.

A forward in training mode moves them before anybody knows whether the step is finite. One flat buffer makes it one
clone before the forward and one ``where`` after the backward to take that back, and one all-reduce to average them over
ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from seer import distributed


class RunningStatistics:
    """Means and variances (floating) and update counters (int64) of every BatchNorm below a module.

    Build it after the module's memory exists (``to_empty`` makes new buffers). Loading a state dict copies in place and
    keeps the views.
    """

    def __init__(self, module: nn.Module, group: distributed.Group | None = None) -> None:
        norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]
        self._group = group
        self.values = _rehome([(norm, name) for norm in norms for name in ("running_mean", "running_var")])
        self.counters = _rehome([(norm, "num_batches_tracked") for norm in norms])
        self._values_before = torch.empty_like(self.values)
        self._counters_before = torch.empty_like(self.counters)

    def remember(self) -> None:
        """Before the forward: keep what a step that turns out not to be finite goes back to."""
        self._values_before.copy_(self.values)
        self._counters_before.copy_(self.counters)

    def settle(self, finite: Tensor, *, average: bool) -> None:
        """After the backward: go back where the step is not finite; average over ranks where the step is.

        Args:
            finite: boolean scalar, equal on all ranks.
            average: whether ranks hold different statistics (BatchNorm without synchronisation).
        """
        ranks = distributed.world_size(self._group)
        if average and ranks > 1:
            distributed.sum_over_ranks(self.values, self._group).div_(ranks)
        torch.where(finite, self.values, self._values_before, out=self.values)
        torch.where(finite, self.counters, self._counters_before, out=self.counters)


def _rehome(places: list[tuple[nn.Module, str]]) -> Tensor:
    """Copy the named buffers into one flat tensor and make each a view of its part."""
    buffers = [module.get_buffer(name) for module, name in places]
    if not buffers:
        return torch.empty(0)
    flat = torch.cat([buffer.detach().reshape(-1) for buffer in buffers])
    for (module, name), buffer, part in zip(
        places, buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True
    ):
        setattr(module, name, part.view(buffer.shape))
    return flat
