"""SGD with momentum whose gradients are scaled layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from seer.distributed import local, sum_over_ranks
from seer.errors import UserError

# Where reading `finite` waits for nothing, so that the step needs no copies to fall back on.
_HOSTS = ("cpu",)


class LARC(Optimizer):
    """Layer-wise adaptive rate control (You, Gitman, Ginsburg 2017) as in apex and VISSL with `clip=False`.

    For each tensor p with gradient g, momentum buffer b, L2 norms of the whole tensor::

        if |p| != 0 and |g| != 0:   g <- (g + weight_decay p) trust_coefficient |p| / (|g| + weight_decay |p| + eps)
        b <- momentum b + g
        p <- p - lr b

    The zero-norm rule means that a tensor that starts at zero (BatchNorm's shift, a zero bias) takes its first step
    with the raw gradient times lr, and that a zero gradient leaves only momentum to move p, without decay. The buffer
    holds scaled gradients without lr: a changed lr acts on history too. A tensor without gradient (`grad is None`) is
    left alone. Gradients are those averaged over ranks. Of a tensor that is sharded over ranks (DTensor, FSDP2) each
    rank moves its own part by the norms of the whole, which take one all-reduce a step for all tensors together.

    Args:
        params: parameters or groups; a group with `exclude=True` takes plain SGD steps with momentum: no decay, no
            scaling.
        lr: learning rate; may be set in `param_groups` before each step.
        momentum: share of the buffer that stays, in [0, 1). No dampening, no Nesterov.
        weight_decay: L2 decay, scaled together with the gradient.
        trust_coefficient: size of a step, without momentum, relative to |p| at lr 1.
        eps: keeps the division finite.

    The buffer is `state[p]["momentum"]`, zeros from construction, so that a checkpoint always finds it.

    Raises:
        UserError: a negative value, or momentum of 1 or more.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float,
        weight_decay: float,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
        }
        for name, value in defaults.items():
            if not value >= 0:
                raise UserError(f"LARC {name} {value}", "it is not negative", "use 0 or more")
        if momentum >= 1:
            raise UserError(f"LARC momentum {momentum}", "it is below 1, or the buffer never forgets", "0.9 is usual")
        super().__init__(params, {**defaults, "exclude": False})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group (as torch does) with momentum of zero."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)

    @torch.no_grad()
    def partial_square_norms(self) -> Tensor:
        """This rank's share of the squared norms of sharded weights and gradients, (2 n,), for whoever sums over ranks.

        Empty where nothing is sharded. A part of which several ranks hold copies is divided by their number, so that
        the sum over all ranks is the squared norm of the whole tensor.
        """
        sharded = [
            p for group in self.param_groups if not group["exclude"] for p in _with_gradient(group, sharded=True)
        ]
        if not sharded:
            return local(self.param_groups[0]["params"][0]).new_empty(0)
        squares = torch.stack(
            torch._foreach_norm([local(p) for p in sharded] + [local(_gradient(p)) for p in sharded])
        ).square_()
        copies = [_copies(p) for p in sharded]
        return squares if set(copies) == {1} else squares / squares.new_tensor(copies + copies)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: None = None, *, finite: Tensor | None = None, square_norms: Tensor | None = None
    ) -> None:
        """Takes one step, without waiting for a device; gradients are scaled in place.

        Args:
            closure: not supported.
            finite: boolean scalar on the parameters' device, equal on all ranks; where it is false, weights and
                momentum stay as they are to the last bit, whatever the gradients hold. None: take the step.
            square_norms: `partial_square_norms` summed over ranks, where that travels with something else; None: they
                are computed and summed here.
        """
        if square_norms is None:
            square_norms = sum_over_ranks(self.partial_square_norms())
        weight_squares, gradient_squares = square_norms.chunk(2) if len(square_norms) else (square_norms, square_norms)
        if finite is not None and finite.device.type in _HOSTS:
            if not finite:
                return
            finite = None
        done = 0
        for group in self.param_groups:
            # What every rank holds whole comes first: its norms need nobody else.
            whole, sharded = _with_gradient(group, sharded=False), _with_gradient(group, sharded=True)
            parameters = whole + sharded
            if not parameters:
                continue
            weights = [local(p) for p in parameters]
            gradients = [local(_gradient(p)) for p in parameters]
            if not group["exclude"]:
                part = slice(done, done + len(sharded))
                done += len(sharded)
                norms = [
                    torch.cat([_norms(tensors[: len(whole)], squares), squares[part].sqrt()])
                    for tensors, squares in ((weights, weight_squares), (gradients, gradient_squares))
                ]
                _scale_(gradients, weights, norms[0], norms[1], group)
            buffers = [local(self.state[p]["momentum"]) for p in parameters]
            if finite is None:
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, gradients)
                torch._foreach_add_(weights, buffers, alpha=-group["lr"])
            else:
                moved = torch._foreach_mul(buffers, group["momentum"])
                torch._foreach_add_(moved, gradients)
                _replace(weights, torch._foreach_add(weights, moved, alpha=-group["lr"]), finite)
                _replace(buffers, moved, finite)


def _with_gradient(group: dict[str, Any], *, sharded: bool) -> list[Tensor]:
    return [p for p in group["params"] if p.grad is not None and isinstance(p, DTensor) == sharded]


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _copies(parameter: Tensor) -> int:
    """How many ranks hold the same part."""
    assert isinstance(parameter, DTensor)
    sizes = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_replicate())


def _norms(tensors: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)) if tensors else like.new_empty(0)


def _scale_(
    gradients: list[Tensor],
    weights: list[Tensor],
    weight_norms: Tensor,
    gradient_norms: Tensor,
    group: dict[str, Any],
) -> None:
    weight_decay = group["weight_decay"]
    rates = group["trust_coefficient"] * weight_norms / (gradient_norms + weight_decay * weight_norms + group["eps"])
    # Where the weights are zero, so is their decay, and a rate of 1 leaves the gradient as it is; where the gradient is
    # zero, a rate of 0 takes the decay away again.
    rates = torch.where(weight_norms == 0, 1.0, torch.where(gradient_norms == 0, 0.0, rates))
    torch._foreach_add_(gradients, weights, alpha=weight_decay)
    torch._foreach_mul_(gradients, list(rates.unbind()))


def _replace(old: Sequence[Tensor], new: Sequence[Tensor], finite: Tensor) -> None:
    for before, after in zip(old, new, strict=True):
        torch.where(finite, after, before, out=before)  # a multiplication by 0 would keep NaN
