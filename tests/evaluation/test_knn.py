"""kNN against a naive oracle and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from seer.errors import UserError
from seer.evaluation.knn import knn_predict, knn_top1, nearest, vote


def made(bank: int = 60, queries: int = 23, features: int = 7, classes: int = 4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(bank, features, generator=generator, dtype=torch.float64),
        torch.randint(classes, (bank,), generator=generator),
        torch.randn(queries, features, generator=generator, dtype=torch.float64),
    )


def naive(bank, labels, queries, k: int, temperature: float) -> list[int]:
    """One query, one neighbour at a time, float64."""
    predictions = []
    for query in queries.numpy():
        cosines = [float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) for row in bank.numpy()]
        order = sorted(range(len(cosines)), key=lambda row: (-cosines[row], row))[:k]
        votes: dict[int, float] = {}
        for row in order:
            votes[int(labels[row])] = votes.get(int(labels[row]), 0.0) + math.exp(cosines[row] / temperature)
        predictions.append(max(sorted(votes), key=votes.__getitem__))
    return predictions


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 12), st.integers(1, 50), st.sampled_from([0.02, 0.07, 1.0]), st.integers(0, 99)
)
def test_equals_the_naive_oracle(bank_size, query_count, k, temperature, seed):
    bank, labels, queries = made(bank_size, query_count, seed=seed)
    assert knn_predict(bank, labels, queries, k=k, temperature=temperature).tolist() == naive(
        bank, labels, queries, k, temperature
    )


def test_equals_scikit_learn():
    bank, labels, queries = made(300, 100)
    unit = torch.nn.functional.normalize
    oracle = KNeighborsClassifier(
        n_neighbors=9, metric="euclidean", weights=lambda distances: np.exp((1 - distances**2 / 2) / 0.07)
    ).fit(unit(bank).numpy(), labels.numpy())
    assert (knn_predict(bank, labels, queries, k=9, temperature=0.07).numpy() == oracle.predict(unit(queries))).all()


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("bank_chunk", [1, 8, 59, 1000])
def test_chunk_sizes_do_not_matter(chunk, bank_chunk):
    bank, _, queries = made()
    whole = nearest(bank, queries, k=10)
    parts = nearest(bank, queries, k=10, chunk=chunk, bank_chunk=bank_chunk)
    assert torch.equal(whole.indices_MK, parts.indices_MK)
    torch.testing.assert_close(whole.cosines_MK, parts.cosines_MK, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bank_chunk", [1, 2, 5, 100])
def test_equal_cosines_go_to_the_first_rows(bank_chunk):
    """One-hot rows have cosines of exactly 0 and 1, whatever the chunks."""
    bank = torch.eye(3).repeat(8, 1)
    found = nearest(bank, torch.eye(3), k=5, bank_chunk=bank_chunk)
    assert found.indices_MK.tolist() == [[row + 3 * turn for turn in range(5)] for row in range(3)]
    beyond = nearest(bank, torch.eye(3)[:1], k=10, bank_chunk=bank_chunk)
    assert beyond.indices_MK.tolist() == [[0, 3, 6, 9, 12, 15, 18, 21, 1, 2]]


def test_equal_votes_go_to_the_smaller_class():
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert knn_predict(bank, torch.tensor([5, 2]), bank[:1], k=2, temperature=0.07).tolist() == [2]


def test_k_is_clipped_to_the_bank():
    bank, labels, queries = made(5)
    assert nearest(bank, queries, k=200).indices_MK.shape == (23, 5)
    assert torch.equal(
        knn_predict(bank, labels, queries, k=200, temperature=0.07),
        knn_predict(bank, labels, queries, k=5, temperature=0.07),
    )


def test_length_of_rows_does_not_matter():
    bank, labels, queries = made()
    expected = knn_predict(bank, labels, queries, k=7, temperature=0.07)
    scaled = knn_predict(bank.float() * 1e4, labels, queries.float() * 1e-4, k=7, temperature=0.07)
    assert torch.equal(scaled, expected)


def test_small_temperatures_do_not_overflow():
    bank, labels, _ = made()
    predictions = knn_predict(bank.float(), labels, bank.float(), k=20, temperature=0.001)
    assert torch.equal(predictions, labels)  # each image is its own nearest neighbour


def test_bytes_are_rows_too():
    pixels = torch.randint(0, 256, (40, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3
    assert torch.equal(
        knn_predict(pixels, labels, pixels, k=5, temperature=0.07),
        knn_predict(pixels.double(), labels, pixels.double(), k=5, temperature=0.07),
    )


def test_top1_is_a_share():
    bank, labels, queries = made()
    predictions = knn_predict(bank, labels, queries, k=5, temperature=0.07)
    wrong = predictions.clone()
    wrong[:6] += 1
    assert knn_top1(bank, labels, queries, wrong, k=5, temperature=0.07) == pytest.approx(17 / 23)


def test_collapsed_features_score_chance():
    """All rows alike: the first k of the bank decide, for every query the same class."""
    bank = torch.ones(40, 5)
    predictions = knn_predict(bank, torch.arange(40) % 4, torch.ones(8, 5), k=8, temperature=0.07)
    assert len(set(predictions.tolist())) == 1


def test_what_cannot_be():
    bank, labels, queries = made()
    with pytest.raises(UserError, match="k=0"):
        nearest(bank, queries, k=0)
    with pytest.raises(UserError, match="empty"):
        nearest(bank[:0], queries, k=1)
    with pytest.raises(UserError, match="temperature=0"):
        vote(nearest(bank, queries, k=1), labels, temperature=0)
    with pytest.raises(UserError, match="no labelled query"):
        knn_top1(bank, labels, queries[:0], labels[:0], k=1, temperature=0.07)
    assert nearest(bank, queries[:0], k=3).indices_MK.shape == (0, 3)


def test_a_label_of_two_milliards_costs_no_memory():
    bank = torch.eye(3)
    labels = torch.tensor([2**31 - 1, 7, 0])
    assert knn_predict(bank, labels, bank, k=1, temperature=0.07).tolist() == labels.tolist()
