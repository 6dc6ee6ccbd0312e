"""Soft assignment of images to prototypes under equal use of the prototypes."""

from __future__ import annotations

import torch
from torch import Tensor

from seer import distributed
from seer.errors import UserError

SMALLEST_EPSILON = 0.003  # exp(-2 / epsilon) leaves float64's normal range below 0.0029


@torch.no_grad()
def sinkhorn_assignments(
    scores_NK: Tensor, *, epsilon: float, iterations: int, group: distributed.Group | None = None
) -> Tensor:
    """Sinkhorn-Knopp assignments of samples to prototypes (Caron et al. 2020, "SwAV"; Cuturi 2013).

    Each iteration gives every prototype the same mass over the samples of all ranks, then every sample the same mass
    over prototypes; the last word is the samples', so that rows sum to 1 and the prototypes' masses are equal only in
    the limit. Two vectors of factors are iterated instead of the matrix: q = diag(row) exp(scores / epsilon)
    diag(column). Constant factors cancel in the last division, so neither N nor K nor the count of ranks enters.

    Computed in float64 after the maximum over all ranks was subtracted: for cosines every quotient then stays in the
    normal range for any epsilon that is allowed. float32 does not: at epsilon 0.01 a prototype that no sample is near
    underflows, silently. A rank's own maximum, or a row's, would change the result.

    Args:
        scores_NK: (..., N, K) floating point, cosines; N is this rank's share of the samples and may differ between
            ranks. Leading dimensions are problems of their own that share each all-reduce.
        epsilon: weight of the entropy, at least 0.003; smaller is sharper.
        iterations: 0 or more; 0 is softmax(scores / epsilon).
        group: ranks that hold the samples; default: the default group if one is initialised, else this process.

    Returns:
        (..., N, K) float64 for float64 scores, else float32; rows sum to 1; no gradient. No host synchronisation; one
        MAX all-reduce and one SUM all-reduce an iteration. Scores that are not finite give NaN.

    Raises:
        UserError: epsilon below 0.003, iterations below 0.
    """
    check_sinkhorn(epsilon, iterations)
    scores = scores_NK.to(torch.float64)  # autocast leaves float64 alone
    if iterations == 0:
        assignments = torch.softmax(scores / epsilon, dim=-1)
    else:
        highest = distributed.max_over_ranks(scores.amax(dim=(-2, -1), keepdim=True), group)
        assignments = _balance(((scores - highest) / epsilon).exp_(), iterations, group)
    return assignments.to(torch.promote_types(scores_NK.dtype, torch.float32))


def check_sinkhorn(epsilon: float, iterations: int) -> None:
    """Refuses settings that Sinkhorn cannot compute (UserError)."""
    if not epsilon >= SMALLEST_EPSILON:
        raise UserError(
            f"epsilon {epsilon}",
            f"Sinkhorn computes exp(-2 / epsilon), which float64 holds down to epsilon {SMALLEST_EPSILON}",
            f"use {SMALLEST_EPSILON} or more; 0.02 to 0.05 are usual",
        )
    if iterations < 0:
        raise UserError(f"iterations {iterations}", "Sinkhorn takes 0 or more iterations", "3 and 10 are usual")


def _balance(kernel_NK: Tensor, iterations: int, group: distributed.Group | None) -> Tensor:
    row_N1 = torch.ones_like(kernel_NK[..., :1])
    for _ in range(iterations):
        mass_K1 = distributed.sum_over_ranks(kernel_NK.mT @ row_N1, group)
        column_K1 = mass_K1.reciprocal()
        row_N1 = (kernel_NK @ column_K1).reciprocal()
    scaled_NK = kernel_NK * column_K1.mT
    return scaled_NK / scaled_NK.sum(dim=-1, keepdim=True)
