"""SGD with momentum whose gradients are scaled layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

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
    left alone. Gradients are those averaged over ranks; a tensor that is sharded over ranks would get a wrong norm.

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
    def step(self, closure: None = None, *, finite: Tensor | None = None) -> None:  # type: ignore[override]
        """Takes one step, without waiting for a device; gradients are scaled in place.

        Args:
            closure: not supported.
            finite: boolean scalar on the parameters' device, equal on all ranks; where it is false, weights and
                momentum stay as they are to the last bit, whatever the gradients hold. None: take the step.
        """
        if finite is not None and finite.device.type in _HOSTS:
            if not finite:
                return
            finite = None
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            gradients = [p.grad for p in weights]
            if not group["exclude"]:
                _scale_(gradients, weights, group["weight_decay"], group["trust_coefficient"], group["eps"])
            buffers = [self.state[p]["momentum"] for p in weights]
            if finite is None:
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, gradients)
                torch._foreach_add_(weights, buffers, alpha=-group["lr"])
            else:
                moved = torch._foreach_mul(buffers, group["momentum"])
                torch._foreach_add_(moved, gradients)
                _replace(weights, torch._foreach_add(weights, moved, alpha=-group["lr"]), finite)
                _replace(buffers, moved, finite)


def _scale_(
    gradients: list[Tensor], weights: list[Tensor], weight_decay: float, trust_coefficient: float, eps: float
) -> None:
    weight_norms = torch.stack(torch._foreach_norm(weights))
    gradient_norms = torch.stack(torch._foreach_norm(gradients))
    rates = trust_coefficient * weight_norms / (gradient_norms + weight_decay * weight_norms + eps)
    # Where the weights are zero, so is their decay, and a rate of 1 leaves the gradient as it is; where the gradient is
    # zero, a rate of 0 takes the decay away again.
    rates = torch.where(weight_norms == 0, 1.0, torch.where(gradient_norms == 0, 0.0, rates))
    torch._foreach_add_(gradients, weights, alpha=weight_decay)
    torch._foreach_mul_(gradients, list(rates.unbind()))


def _replace(old: Sequence[Tensor], new: Sequence[Tensor], finite: Tensor) -> None:
    for before, after in zip(old, new, strict=True):
        torch.where(finite, after, before, out=before)  # a multiplication by 0 would keep NaN
