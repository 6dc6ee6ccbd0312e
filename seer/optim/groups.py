"""Which parameters are treated alike by an optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], exclude_norms_and_biases: bool
) -> list[dict[str, Any]]:
    """Groups for LARC and MaskedAdamW, each `{"params": [...], "exclude": bool}`; none is empty.

    Args:
        named_parameters: as `module.named_parameters()` gives them; those that need no gradient are left out.
        exclude_norms_and_biases: put vectors and scalars (BatchNorm's parameters, every bias) into a group of their
            own, which gets no weight decay and, under LARC, no scaling. SEER's recipe excludes nothing.
    """
    treated: list[nn.Parameter] = []
    excluded: list[nn.Parameter] = []
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            (excluded if exclude_norms_and_biases and parameter.ndim <= 1 else treated).append(parameter)
    groups = [{"params": treated, "exclude": False}, {"params": excluded, "exclude": True}]
    return [group for group in groups if group["params"]]
