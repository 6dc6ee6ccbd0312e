"""SGD with momentum whose gradients are scaled layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from seer.errors import UserError

_Tensors = list[Tensor] | tuple[Tensor, ...]


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
        """Takes one step, without host synchronisation.

        Args:
            closure: not supported.
            finite: boolean scalar on the parameters' device, equal on all ranks; where it is false, weights and
                momentum stay as they are to the last bit, whatever the gradients hold. None: take the step.
        """
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            gradients: _Tensors = [p.grad for p in weights if p.grad is not None]
            if not group["exclude"]:
                gradients = _scaled(weights, gradients, group["weight_decay"], group["trust_coefficient"], group["eps"])
            buffers = [self.state[p]["momentum"] for p in weights]
            moved = torch._foreach_mul(buffers, group["momentum"])
            torch._foreach_add_(moved, gradients)
            _replace(buffers, moved, finite)
            _replace(weights, torch._foreach_add(weights, moved, alpha=-group["lr"]), finite)


def _scaled(
    weights: _Tensors, gradients: _Tensors, weight_decay: float, trust_coefficient: float, eps: float
) -> _Tensors:
    weight_norms = torch.stack(torch._foreach_norm(weights))
    gradient_norms = torch.stack(torch._foreach_norm(gradients))
    adapts = (weight_norms != 0) & (gradient_norms != 0)
    rates = trust_coefficient * weight_norms / (gradient_norms + weight_decay * weight_norms + eps)
    decays = adapts.to(rates.dtype) * weight_decay
    scaled = torch._foreach_mul(weights, decays.unbind())
    torch._foreach_add_(scaled, gradients)
    torch._foreach_mul_(scaled, torch.where(adapts, rates, 1.0).unbind())
    return scaled


def _replace(old: _Tensors, new: _Tensors, finite: Tensor | None) -> None:
    if finite is None:
        torch._foreach_copy_(old, new)
        return
    for before, after in zip(old, new, strict=True):
        torch.where(finite, after, before, out=before)  # a multiplication by 0 would keep NaN
