"""BatchNorm over the images of all ranks, on gloo and on CUDA, one exchange a layer for all resolutions.

``torch.nn.SyncBatchNorm`` refuses tensors on the CPU and exchanges once for each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from seer import distributed


class SyncBatchNorm(_BatchNorm):
    """BatchNorm whose batch is the images of all ranks; each tensor of a list is normalised by itself.

    In training mode a layer costs one all-gather in the forward and one all-reduce in the backward, however many
    tensors the list has; all ranks give lists of the same length. Ranks may hold different numbers of images, at least
    one each. Statistics are float32 (float64 for float64 input), merged by Chan's formula; the running variance is
    unbiased with the count of all ranks. The gradients of weight and bias stay sums over this rank's images, as those
    of every other layer. In evaluation mode and in one process it is ``nn.BatchNorm``, without a collective.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in ``nn.BatchNorm2d``.
        group: ranks that share statistics; the default group if None.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        group: distributed.Group | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.group = group

    @overload
    def forward(self, maps: Tensor) -> Tensor: ...

    @overload
    def forward(self, maps: list[Tensor]) -> list[Tensor]: ...

    def forward(self, maps: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Normalised maps (N, C, ...) in the dtype and memory format of the input: a tensor for a tensor, else a list.

        Running statistics are updated once for each tensor, in the order of the list.
        """
        if isinstance(maps, Tensor):
            return self._normalised([maps])[0]
        return self._normalised(maps)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (N, C, ...), got {input.dim()} dimensions")

    def _normalised(self, maps: list[Tensor]) -> list[Tensor]:
        if not self.training or distributed.world_size(self.group) == 1:
            return [_BatchNorm.forward(self, x) for x in maps]
        with torch.no_grad():
            counts, means, variances = _statistics_of_all_ranks(maps, self.group)
            if self.track_running_stats:
                self._update_running_statistics(counts, means, variances)
        outputs: tuple[Tensor, ...] = _Normalise.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self.weight, self.bias, counts, means, variances, self.eps, self.group, *maps
        )
        return list(outputs)

    def _update_running_statistics(self, counts: Tensor, means: Tensor, variances: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        dtype = self.running_mean.dtype
        unbiased = (variances * (counts / (counts - 1))).to(dtype)
        for mean, variance in zip(means.to(dtype), unbiased, strict=True):
            self.num_batches_tracked.add_(1)
            share = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.to(dtype)
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance, share)


def synchronise_batchnorms(module: nn.Module, group: distributed.Group | None = None) -> None:
    """Replaces every BatchNorm below a module by a ``SyncBatchNorm``, in place, also on the meta device.

    Parameters and buffers are the same tensors under the same names. Hooks of the replaced layers are lost.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, _synchronised(child, group))


def _synchronised(norm: _BatchNorm, group: distributed.Group | None) -> SyncBatchNorm:
    synchronised = SyncBatchNorm(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
        group=group,
        device="meta",
    )
    synchronised.train(norm.training)
    for name in ("weight", "bias"):
        synchronised.register_parameter(name, getattr(norm, name))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        synchronised.register_buffer(name, getattr(norm, name))
    return synchronised


def _statistics_of_all_ranks(maps: Sequence[Tensor], group: distributed.Group | None) -> tuple[Tensor, Tensor, Tensor]:
    """(T, C) each, float32 or float64, of T maps: values a channel, mean, biased variance (one all-gather)."""
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    # The kernel moves running statistics, too: these are nobody's, and their dtype is the one it computes in.
    unused = maps[0].new_zeros(maps[0].shape[1], dtype=dtype)
    rows = []
    for x in maps:
        mean, variance = torch.batch_norm_update_stats(x, unused, unused, 0.0)
        count = x.numel() // x.shape[1]
        rows.append(torch.stack([torch.full_like(mean, count), mean, variance * count]))
    counts_RTC, means_RTC, squares_RTC = distributed.gather_rows(torch.stack(rows), group).unbind(2)
    # Chan et al. 1983: squares are sums of squared differences from each rank's own mean. Differences from the first
    # rank's mean are small where means are large.
    counts = counts_RTC.sum(0)
    means = means_RTC[0] + (counts_RTC * (means_RTC - means_RTC[0])).sum(0) / counts
    squares = (squares_RTC + counts_RTC * (means_RTC - means).square()).sum(0)
    return counts, means, squares / counts


class _Normalise(torch.autograd.Function):
    """Maps normalised with statistics that came from them: the gradient goes through mean and variance of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        counts: Tensor,
        means: Tensor,
        variances: Tensor,
        eps: float,
        group: distributed.Group | None,
        *maps: Tensor,
    ) -> tuple[Tensor, ...]:
        # A bfloat16 map is normalised in float32 if, and only if, everything else is float32.
        weight, bias = (None if part is None else part.to(means.dtype) for part in (weight, bias))
        ctx.save_for_backward(weight, counts, means, variances, *maps)
        ctx.eps, ctx.group = eps, group
        return tuple(
            F.batch_norm(x, mean, variance, weight, bias, eps=eps)
            for x, mean, variance in zip(maps, means, variances, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, counts, means, variances, *maps = ctx.saved_tensors
        inverse_deviations = (variances + ctx.eps).rsqrt()
        sums_T2C = torch.stack(
            [
                torch.stack(_gradient_sums(*parts, ctx.eps))
                for parts in zip(gradients, maps, means, variances, inverse_deviations, strict=True)
            ]
        )
        own_2C = sums_T2C.sum(0)  # before the exchange, which is in place
        distributed.sum_over_ranks(sums_T2C, ctx.group)
        # dx = scale (dy - sum(dy) / count - xhat sum(dy xhat) / count)
        scales = inverse_deviations if weight is None else inverse_deviations * weight
        shifts, slopes = (-scales.unsqueeze(1) * sums_T2C / counts.unsqueeze(1)).unbind(1)
        inputs = []
        for dy, x, mean, variance, scale, shift, slope in zip(
            gradients, maps, means, variances, scales, shifts, slopes, strict=True
        ):
            dx = F.batch_norm(x, mean, variance, slope, shift, eps=ctx.eps)
            if dy.dtype == scale.dtype:
                dx.addcmul_(dy, scale.view(-1, *[1] * (dy.dim() - 2)))
            else:
                # addcmul_ would make float32 copies of both: ten times as slow on a CPU.
                dx.add_(F.batch_norm(dy, torch.zeros_like(scale), torch.ones_like(scale), scale, eps=0.0))
            inputs.append(dx)
        weight_gradient = own_2C[1] if ctx.needs_input_grad[0] else None
        bias_gradient = own_2C[0] if ctx.needs_input_grad[1] else None
        return (weight_gradient, bias_gradient, None, None, None, None, None, *inputs)


def _gradient_sums(
    dy: Tensor, x: Tensor, mean: Tensor, variance: Tensor, inverse_deviation: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(C,) each: sums of dy and of dy xhat over this rank, from the kernel that gives them as BatchNorm's gradients."""
    # In evaluation form the sums are these; the weight plays no part in them. CPU and CUDA read different statistics.
    _, dy_xhat, dy_sum = torch.ops.aten.native_batch_norm_backward(
        dy, x, mean, mean, variance, mean, inverse_deviation, False, eps, [False, True, True]
    )
    return dy_sum, dy_xhat
