"""Sinkhorn against published implementations' numbers, a log-domain oracle, and what must not change it."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import ranks

from seer.errors import UserError
from seer.objectives.sinkhorn import sinkhorn_assignments

# N, K, epsilon, iterations; q[0,0], q[0,1], q[1,2], q[N-1,K-1], q[N-1,0], sum of column 0, of column K-1, checksum;
# arg-max of each row. From executing the float64 Sinkhorn of facebookresearch/swav and vissl.
GOLDEN = [
    ((8, 4, 0.05, 3), (5.7884656e-09, 0.9998458354, 3.372024869e-11, 7.440977022e-14, 2.988422952e-14, 2.005958688,
                       1.047459453, -6.066395016), None),
    ((6, 10, 0.05, 3), (2.751083557e-09, 0.5429737666, 6.900611834e-10, 0.2912695118, 1.21440768e-12, 0.5965271549,
                        0.5989533915, -0.6680030677), "1 5 0 8 3 2"),
    ((16, 12, 0.03, 10), (6.635389533e-17, 0.8471804349, 9.981281242e-21, 4.61595332e-21, 4.43300139e-28, 1.462304567,
                          1.380415336, -4.670617836), "1 5 0 4 3 6 2 11 7 9 3 8 10 2 4 8"),
    ((5, 5, 0.5, 1), (0.04362169951, 0.3979744062, 0.1425621616, 0.05478342312, 0.1008591588, 1.032489181, 1.003530544,
                      -2.505579276), None),
    ((4, 3, 0.05, 0), (4.271537498e-09, 0.9998717118, 2.81830182e-11, 1.876184545e-15, 1.0, 2.012372122,
                       0.0001282839555, -2.793375713), None),
    ((12, 7, 0.003, 10), (1.578735699e-145, 0.03672739272, 5.057325109e-192, 2.836110438e-159, 1.0, 2.999971842,
                          1.963273243, -4.733318298), "6 5 0 0 3 6 2 5 4 1 3 0"),
]  # fmt: skip


def golden_scores(n, k):
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(k, dtype=torch.float64)
    return torch.sin(0.7 * i + 1.3 * j + 0.1 * i * j)


@pytest.mark.parametrize("setting, values, largest", GOLDEN)
def test_published_numbers(setting, values, largest):
    n, k, epsilon, iterations = setting
    q = sinkhorn_assignments(golden_scores(n, k), epsilon=epsilon, iterations=iterations)
    weights = torch.cos(torch.arange(n, dtype=torch.float64)[:, None] + 2 * torch.arange(k, dtype=torch.float64))
    seen = [q[0, 0], q[0, 1], q[1, 2], q[-1, -1], q[-1, 0], q[:, 0].sum(), q[:, -1].sum(), (q * weights).sum()]
    assert [float(value) for value in seen] == pytest.approx(values, rel=2e-9, abs=0)
    if largest:
        assert q.argmax(dim=1).tolist() == [int(word) for word in largest.split()]


def log_domain_oracle(scores, epsilon, iterations):
    log_q = scores.double() / epsilon
    for _ in range(iterations):
        log_q = log_q - torch.logsumexp(log_q, dim=0, keepdim=True)
        log_q = log_q - torch.logsumexp(log_q, dim=1, keepdim=True)
    return torch.softmax(log_q, dim=1)


def cosines(kind, n=96, k=60, d=16):
    generator = torch.Generator().manual_seed(5)
    if kind == "uniform":
        return torch.rand(n, k, generator=generator, dtype=torch.float64) * 2 - 1
    if kind == "plus and minus one":
        return torch.randint(0, 2, (n, k), generator=generator).double() * 2 - 1
    if kind == "one prototype opposite to all":
        scores = torch.ones(n, k, dtype=torch.float64)
        scores[:, 0] = -1
        return scores
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    prototypes = torch.randn(k, d, generator=generator, dtype=torch.float64)
    if kind == "collapsed":
        rows = rows[:1] + 1e-3 * rows
    return torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(prototypes, dim=1).T


KINDS = ["random", "collapsed", "uniform", "plus and minus one", "one prototype opposite to all"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epsilon", [0.05, 0.03, 0.01, 0.003])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_equals_a_log_domain_oracle(kind, epsilon, iterations):
    scores = cosines(kind)
    oracle = log_domain_oracle(scores, epsilon, iterations)
    q = sinkhorn_assignments(scores, epsilon=epsilon, iterations=iterations)
    assert (q - oracle).abs().max() < 1e-11
    narrow = scores.float()
    q = sinkhorn_assignments(narrow, epsilon=epsilon, iterations=iterations)
    assert q.dtype == torch.float32
    assert (q - log_domain_oracle(narrow, epsilon, iterations)).abs().max() < 1e-6


def test_zero_iterations_are_softmax_even_of_scores_that_are_no_cosines():
    scores = torch.tensor([[1000.0, 999.99, 0.0], [-1000.0, -1000.0, -2000.0]], dtype=torch.float64)
    q = sinkhorn_assignments(scores, epsilon=0.01, iterations=0)
    assert torch.allclose(q, torch.softmax(scores / 0.01, dim=1), rtol=1e-14, atol=0)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), k=st.integers(2, 9), iterations=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_rows_sum_to_one_and_order_does_not_matter(seed, n, k, iterations):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n, k, generator=generator, dtype=torch.float64) * 2 - 1
    rows, columns = torch.randperm(n, generator=generator), torch.randperm(k, generator=generator)
    q = sinkhorn_assignments(scores, epsilon=0.05, iterations=iterations)
    assert (q.sum(dim=1) - 1).abs().max() < 1e-14
    assert (q >= 0).all()
    permuted = sinkhorn_assignments(scores[rows][:, columns], epsilon=0.05, iterations=iterations)
    assert torch.allclose(permuted, q[rows][:, columns], rtol=0, atol=1e-12)
    doubled = sinkhorn_assignments(torch.cat([scores, scores]), epsilon=0.05, iterations=iterations)
    assert torch.allclose(doubled[:n], q, rtol=0, atol=1e-12)


def test_a_constant_added_to_a_prototype_changes_nothing_and_constant_scores_are_uniform():
    scores = cosines("random", 20, 8)
    shifted = scores + torch.linspace(-0.3, 0.3, 8, dtype=torch.float64)
    q = sinkhorn_assignments(scores, epsilon=0.05, iterations=3)
    assert torch.allclose(sinkhorn_assignments(shifted, epsilon=0.05, iterations=3), q, rtol=0, atol=1e-12)
    uniform = sinkhorn_assignments(torch.full((5, 4), 0.3), epsilon=0.05, iterations=3)
    assert torch.equal(uniform, torch.full((5, 4), 0.25))


def test_prototypes_are_used_equally_in_the_limit():
    q = sinkhorn_assignments(cosines("random", 40, 8), epsilon=0.2, iterations=200)
    assert torch.allclose(q.sum(dim=0), torch.full((8,), 5.0, dtype=torch.float64), rtol=1e-9)


def test_leading_dimensions_are_problems_of_their_own():
    problems = torch.stack([cosines("random"), cosines("uniform") - 5.0, cosines("collapsed")])
    together = sinkhorn_assignments(problems[:, None], epsilon=0.01, iterations=4)
    for problem, q in zip(problems, together[:, 0], strict=True):
        assert torch.allclose(sinkhorn_assignments(problem, epsilon=0.01, iterations=4), q, rtol=1e-12, atol=0)


def test_dtype_gradient_autocast_and_nan():
    scores = cosines("random", 6, 5).requires_grad_()
    q = sinkhorn_assignments(scores, epsilon=0.05, iterations=3)
    assert not q.requires_grad and q.dtype == torch.float64
    assert sinkhorn_assignments(scores.bfloat16(), epsilon=0.05, iterations=3).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sinkhorn_assignments(scores, epsilon=0.05, iterations=3), q)
    broken = scores.detach().clone()
    broken[2, 1] = math.nan
    assert sinkhorn_assignments(broken, epsilon=0.05, iterations=3).isnan().all()


@pytest.mark.parametrize("epsilon, iterations", [(0.0029, 3), (0.0, 3), (-0.1, 3), (math.nan, 3), (0.05, -1)])
def test_settings_that_are_refused(epsilon, iterations):
    with pytest.raises(UserError):
        sinkhorn_assignments(torch.zeros(2, 2), epsilon=epsilon, iterations=iterations)


def of_my_rows(scores, cuts):
    rank = dist.get_rank()
    mine = scores[:, cuts[rank] : cuts[rank + 1]]
    return sinkhorn_assignments(mine, epsilon=0.01, iterations=10)


@pytest.mark.parametrize("cuts", [[0, 48, 96], [0, 10, 96], [0, 24, 48, 72, 96]])
def test_rows_of_several_ranks_equal_those_of_one(cuts):
    # Ranks whose scores lie far apart would differ if each subtracted its own maximum.
    scores = torch.stack([cosines("random"), cosines("uniform")])
    scores[:, cuts[1] :] = scores[:, cuts[1] :] * 0.5 - 0.5
    parts = ranks(len(cuts) - 1).run(of_my_rows, scores, cuts)
    whole = sinkhorn_assignments(scores, epsilon=0.01, iterations=10)
    assert torch.allclose(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)
