"""AdamW under the mask: the simple alternative to LARC for small runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from seer.distributed import local


class MaskedAdamW(torch.optim.AdamW):
    """torch's fused AdamW (Loshchilov and Hutter 2019), whose step can be called off on the device.

    Args:
        params: parameters or groups; a group with `exclude=True` gets no weight decay.
        lr: learning rate; may be set in `param_groups` before each step.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.

    The state (`step`, `exp_avg`, `exp_avg_sq`) is there from construction, so that a checkpoint always finds it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group (as torch does) with its state."""
        if param_group.setdefault("exclude", False):
            param_group["weight_decay"] = 0.0
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }

    def partial_square_norms(self) -> Tensor:
        """Empty: this optimizer needs no norms (see LARC)."""
        return torch.empty(0, device=self.param_groups[0]["params"][0].device)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: None = None, *, finite: Tensor | None = None, square_norms: Tensor | None = None
    ) -> None:
        """Takes one step, without host synchronisation.

        Args:
            closure: not supported.
            square_norms: not looked at (see LARC).
            finite: boolean scalar, equal on all ranks; where it is false nothing changes, step counts included,
                whatever the gradients hold. None: take the step.
        """
        found_inf = None if finite is None else (~finite).to(torch.float32)  # the kernel then returns early
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in parameters]
            # torch's kernel on each rank's own part: element by element, it needs nothing of the others.
            adamw(
                [local(p) for p in parameters],
                [local(p.grad) for p in parameters],
                [local(state["exp_avg"]) for state in states],
                [local(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                found_inf=found_inf,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
