"""Classification by the nearest labelled images: what unsupervised features are worth, without training anything.

The weighted vote of Wu, Xiong, Yu, Lin 2018 ("Unsupervised feature learning via non-parametric instance
discrimination", section 3.4): a class gets exp(cosine / temperature) of each of the k nearest images that has it.
Published tables use k 20 with temperature 0.07 (DINO), or k 200 with 0.1 (older ones).

Letters: N images of the bank, M queries, F features, K neighbours (after clipping).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from seer.errors import UserError

_CHUNK = 1024
_BANK_CHUNK = 16384


class Neighbours(NamedTuple):
    """The nearest images of the bank, nearest first.

    Attributes:
        cosines_MK: float32 (float64 where the features are).
        indices_MK: int64, rows of the bank.
    """

    cosines_MK: Tensor
    indices_MK: Tensor


def nearest(
    bank_NF: Tensor, queries_MF: Tensor, *, k: int, chunk: int = _CHUNK, bank_chunk: int = _BANK_CHUNK
) -> Neighbours:
    """The k rows of the bank with the largest cosines to each query.

    Memory beyond the arguments: chunk x bank_chunk cosines and k results a query; the whole matrix is never made.
    Equal cosines: the row that comes first in the bank is nearer. Other chunk sizes can change a cosine by its
    rounding, and so the order of rows that are equal but for that.

    Args:
        bank_NF: (N, F) any dtype; rows are brought to unit norm here, float64 in float64, all else in float32.
        queries_MF: (M, F) likewise, on the same device.
        k: neighbours; more than N are clipped to N.
        chunk: queries at a time.
        bank_chunk: rows of the bank at a time.

    Raises:
        UserError: k below 1, or an empty bank.
    """
    if k < 1:
        raise UserError(f"k={k}", "at least one neighbour votes", "use k=20")
    if not len(bank_NF):
        raise UserError("the bank of labelled images is empty", "neighbours are looked for in it", "name other shards")
    k = min(k, len(bank_NF))
    cosines, indices = [], []
    for first in range(0, max(1, len(queries_MF)), chunk):  # no query is one chunk of none
        rows = _unit_rows(queries_MF[first : first + chunk])
        best = Neighbours(
            rows.new_empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
        )
        for start in range(0, len(bank_NF), bank_chunk):
            part = rows @ _unit_rows(bank_NF[start : start + bank_chunk]).T
            found = _largest(part, k)
            best = _merged(best, Neighbours(found.cosines_MK, found.indices_MK + start), k)
        cosines.append(best.cosines_MK)
        indices.append(best.indices_MK)
    return Neighbours(torch.cat(cosines), torch.cat(indices))


def vote(neighbours: Neighbours, bank_labels_N: Tensor, *, temperature: float) -> Tensor:
    """The class with the largest sum of exp(cosine / temperature) over its neighbours; the smaller number if equal.

    Args:
        neighbours: from ``nearest``; all K vote.
        bank_labels_N: (N,) integers from 0.
        temperature: above 0; smaller ones trust the very nearest.

    Returns:
        (M,) int64.
    """
    if temperature <= 0:
        raise UserError(f"temperature={temperature}", "votes are exp(cosine / temperature)", "use 0.07")
    # Places are made for the labels that occur: the largest may be two milliards.
    labels_C, places_N = torch.unique(bank_labels_N.long(), return_inverse=True)
    cosines_MK = neighbours.cosines_MK
    # Minus the largest: exp(1 / 0.01) is beyond float32, and a common factor changes no argmax.
    weights_MK = ((cosines_MK - cosines_MK[:, :1]) / temperature).exp()
    votes_MC = weights_MK.new_zeros(len(weights_MK), len(labels_C))
    votes_MC.scatter_add_(1, places_N[neighbours.indices_MK], weights_MK)
    winners_M: Tensor = labels_C[votes_MC.argmax(dim=1)]
    return winners_M


def knn_predict(
    bank_NF: Tensor,
    bank_labels_N: Tensor,
    queries_MF: Tensor,
    *,
    k: int,
    temperature: float,
    chunk: int = _CHUNK,
    bank_chunk: int = _BANK_CHUNK,
) -> Tensor:
    """``nearest``, then ``vote``: (M,) int64 predictions."""
    neighbours = nearest(bank_NF, queries_MF, k=k, chunk=chunk, bank_chunk=bank_chunk)
    return vote(neighbours, bank_labels_N, temperature=temperature)


def knn_top1(
    bank_NF: Tensor,
    bank_labels_N: Tensor,
    queries_MF: Tensor,
    query_labels_M: Tensor,
    *,
    k: int,
    temperature: float,
    chunk: int = _CHUNK,
    bank_chunk: int = _BANK_CHUNK,
) -> float:
    """Share of queries whose class is predicted, in [0, 1].

    Raises:
        UserError: as ``nearest`` and ``vote``, or no queries.
    """
    if not len(queries_MF):
        raise UserError("there are no labelled query images", "a share of none is nothing", "name other shards")
    predictions = knn_predict(
        bank_NF, bank_labels_N, queries_MF, k=k, temperature=temperature, chunk=chunk, bank_chunk=bank_chunk
    )
    return float((predictions == query_labels_M.to(predictions.device)).double().mean())


def _unit_rows(rows: Tensor) -> Tensor:
    """Rows of norm 1; a row of zeros stays zero, with cosine 0 to all."""
    return functional.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=1)


def _largest(cosines: Tensor, k: int) -> Neighbours:
    """The k largest of each row, in no particular order; among equal ones those that come first."""
    width = cosines.shape[1]
    if width <= k:
        return Neighbours(cosines, torch.arange(width, device=cosines.device).expand_as(cosines))
    values, indices = cosines.topk(k + 1, dim=1)
    # topk takes any of equal values. Where the last one inside equals the first one outside, a stable sort decides.
    doubtful = values[:, k - 1] == values[:, k]
    values, indices = values[:, :k], indices[:, :k]
    if doubtful.any():
        sorted_values, sorted_indices = cosines[doubtful].sort(dim=1, descending=True, stable=True)
        values[doubtful], indices[doubtful] = sorted_values[:, :k], sorted_indices[:, :k]
    return Neighbours(values, indices)


def _merged(one: Neighbours, other: Neighbours, k: int) -> Neighbours:
    """The k nearest of both, by falling cosine, then by rising index."""
    cosines = torch.cat([one.cosines_MK, other.cosines_MK], dim=1)
    indices = torch.cat([one.indices_MK, other.indices_MK], dim=1)
    indices, order = indices.sort(dim=1)
    cosines, order = cosines.gather(1, order).sort(dim=1, descending=True, stable=True)
    return Neighbours(cosines[:, :k], indices.gather(1, order)[:, :k])
