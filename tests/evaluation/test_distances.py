"""KID and Fréchet distance against brute force and closed forms."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_run import normal

from pipeline.evaluation import distances
from pipeline.evaluation.retrieval import EvaluationError


def kernel(a, b):
    return (float(a @ b) / len(a) + 1) ** 3


def kernel_distance(x, y, biased=False):
    """The squared mean discrepancy, pair by pair; the unbiased one leaves out pairs with itself."""
    n = range(len(x))
    inside = [kernel(s[i], s[j]) for s in (x, y) for i in n for j in n if i != j or biased]
    across = [kernel(a, b) for a in x for b in y]
    return 2 * np.mean(inside) - 2 * np.mean(across)


def test_kid_is_the_mean_discrepancy_pair_by_pair():
    x = normal(20, 5)
    y = 0.3 + 1.5 * normal(20, 5, seed=1)
    found = distances.kid(x, y)
    assert found.value == pytest.approx(kernel_distance(x, y), rel=1e-9)
    assert found.n == 20
    bounds = [found.value - 1.96 * found.error, found.value + 1.96 * found.error]
    assert found.interval == pytest.approx(bounds)
    assert distances.kid(x, y) == found


def test_kid_of_a_set_with_itself_is_about_zero():
    """All that is left is the bias of pairs of an image with itself, below 0."""
    x = normal(200, 4)
    found = distances.kid(x, x).value
    apart = distances.kid(x, 1 + normal(200, 4, seed=1)).value
    assert -0.1 * apart < found < 0


def test_kid_error_is_its_spread_over_datasets():
    found = [
        distances.kid(normal(64, 3, seed=i), 0.7 + normal(64, 3, seed=1000 + i)) for i in range(60)
    ]
    spread = np.std([kid.value for kid in found], ddof=1)
    # 60 spreads: 9 %.
    assert np.mean([kid.error**2 for kid in found]) ** 0.5 == pytest.approx(spread, rel=0.3)


def test_kid_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    first = torch.rand(1)
    torch.manual_seed(3)
    distances.kid(normal(8, 2), normal(8, 2, seed=1))
    assert torch.equal(torch.rand(1), first)


def gaussian(n, mean, deviation, seed):
    """Return n points whose sample mean and covariance are exactly these."""
    x = normal(n, len(mean), seed=seed)
    x = x - x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return x * torch.tensor(deviation, dtype=x.dtype) + torch.tensor(mean, dtype=x.dtype)


def test_frechet_distance_of_known_gaussians():
    """|mu - mu'|^2 + sum (sigma - sigma')^2 where the covariances commute."""
    x = gaussian(50, [0, 1, 2], [1, 2, 3], 0)
    y = gaussian(50, [1, 1, 0], [2, 2, 0.5], 1)
    assert distances.frechet_distance(x, y) == pytest.approx(1 + 4 + 1 + 0 + 2.5**2, rel=1e-6)
    assert distances.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_fewer_points_than_dimensions():
    """The trace of (S S')^(1/2) is the nuclear norm of the product of the centred points."""
    x = normal(20, 64)
    y = 0.5 + normal(20, 64, seed=1)
    a = (x - x.mean(0)) / 19**0.5
    b = (y - y.mean(0)) / 19**0.5
    traces = a.square().sum() + b.square().sum() - 2 * torch.linalg.matrix_norm(a @ b.T, "nuc")
    expected = (x.mean(0) - y.mean(0)).square().sum() + traces
    assert distances.frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("distance", [distances.kid, distances.frechet_distance])
@pytest.mark.parametrize(("n", "m"), [(8, 9), (3, 3)])
def test_require_equal_sizes_refuses_other_sizes(distance, n, m):
    with pytest.raises(EvaluationError, match=rf"\({n}, 2\) and \({m}, 2\)"):
        distance(normal(n, 2), normal(m, 2))


def test_random_halves_are_disjoint_equal_and_always_the_same():
    a, b = distances.random_halves(11)
    assert len(a) == len(b) == 5
    assert len({*a.tolist(), *b.tolist()}) == 10
    assert torch.equal(distances.random_halves(11)[0], a)


def test_load_inception_refuses_without_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match="torch-fidelity"):
        distances.load_inception()


def test_semantic_breaks_are_noticed(monkeypatch):
    """A KID that is biased by pairs of an image with itself."""
    unbiased = distances.kid

    def biased(real, samples):
        value = kernel_distance(real, samples, biased=True)
        return replace(unbiased(real, samples), value=value)

    monkeypatch.setattr(distances, "kid", biased)
    with pytest.raises(AssertionError):
        test_kid_is_the_mean_discrepancy_pair_by_pair()
