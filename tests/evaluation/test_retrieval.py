"""Ranks, proportions and intervals against closed forms and other libraries."""

import math

import pytest
import scipy
import torch
from tiny_run import normal

from pipeline.evaluation import retrieval
from pipeline.evaluation.retrieval import EvaluationError


def test_retrieval_ranks_put_an_image_first_and_its_opposite_last():
    references = torch.eye(6)
    own = torch.arange(6)
    assert retrieval.retrieval_ranks(references, references, own).tolist() == [1] * 6
    mean = references.mean(0)
    opposite = mean - (references - mean)
    assert retrieval.retrieval_ranks(opposite, references, own).tolist() == [6] * 6


def test_retrieval_ranks_count_ties_against_the_own_image():
    """At the mean, every image is as similar as the own one, which is then last."""
    references = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    own = torch.tensor([2])
    assert retrieval.retrieval_ranks(torch.zeros(1, 2), references, own).tolist() == [4]
    assert retrieval.retrieval_ranks(torch.tensor([[1.0, 0]]), references, own).tolist() == [3]


def test_retrieval_ranks_are_centred_on_the_references():
    """A shift of everything by the same vector changes no rank, as it would without centring."""
    references = normal(40, 8)
    features = normal(30, 8, seed=1)
    own = torch.randint(40, (30,), generator=torch.Generator().manual_seed(0))
    moved = retrieval.retrieval_ranks(features + 100, references + 100, own)
    assert moved.tolist() == retrieval.retrieval_ranks(features, references, own).tolist()
    assert len(moved.unique()) > 10


@pytest.mark.parametrize(("k", "n"), [(0, 20), (1, 20), (10, 20), (19, 20), (20, 20), (280, 467)])
def test_wilson_interval_is_where_the_score_test_turns(k, n):
    """The bounds p are the roots of |k/n - p| = z sqrt(p (1 - p) / n)."""
    low, high = retrieval.wilson_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for p in (low, high):
        assert abs(k / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), abs=1e-9)


@pytest.mark.parametrize(("k", "n"), [(1, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_impossible_counts(k, n):
    with pytest.raises(EvaluationError, match=f"k={k}, n={n}"):
        retrieval.wilson_interval(k, n)


def test_recall_summary_counts_ranks_to_one_and_to_five():
    found = retrieval.recall_summary(torch.tensor([1, 5, 6, 1]))
    assert (found.recall_at_1.k, found.recall_at_5.k, found.recall_at_5.n) == (2, 3, 4)
    assert found.recall_at_5.value == 0.75


def test_bootstrap_mean_has_students_interval_of_normal_values():
    """400 normal values: the bounds are Student's within a tenth of the interval."""
    values = 3 + 2 * normal(400)
    found = retrieval.bootstrap_mean(values)
    exact = scipy.stats.t.interval(0.95, 399, loc=values.mean(), scale=values.std() / 20)
    assert found.value == pytest.approx(values.mean().item())
    assert found.n == 400
    assert found.interval == pytest.approx(exact, abs=0.1 * (exact[1] - exact[0]))


def _ties_in_favour(features, references, own):
    vectors = retrieval.centred_unit_vectors(references, references)
    similarity = retrieval.centred_unit_vectors(features, references) @ vectors.T
    return (similarity > similarity.gather(1, own[:, None])).sum(1) + 1


@pytest.mark.parametrize(
    ("name", "broken", "check"),
    [
        (
            "retrieval_ranks",
            _ties_in_favour,
            test_retrieval_ranks_count_ties_against_the_own_image,
        ),
        (
            "centred_unit_vectors",
            lambda features, _references: torch.nn.functional.normalize(features.double(), dim=-1),
            test_retrieval_ranks_are_centred_on_the_references,
        ),
    ],
)
def test_semantic_breaks_are_noticed(monkeypatch, name, broken, check):
    monkeypatch.setattr(retrieval, name, broken)
    with pytest.raises(AssertionError):
        check()
