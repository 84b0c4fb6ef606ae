"""Retrieval ranks of samples among real images, and 95 % intervals.

Images are uint8 (N, 3, H, W) or floats in [-1, 1]; features (N, D) are any network's.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.runs.results import Mean, Proportion, Recall

BOOTSTRAP_RESAMPLES = 1000


class EvaluationError(ValueError):
    """An evaluation that cannot be made as requested."""


def centred_unit_vectors(features: Tensor, references: Tensor) -> Tensor:
    """Return unit vectors of features less the references' mean, in float64.

    Their products are the similarities that images are ranked by.
    """
    return F.normalize(features.double() - references.double().mean(0), dim=-1)


def retrieval_ranks(features: Tensor, references: Tensor, own: Tensor) -> Tensor:
    """Return the rank of row own[i] of the references (N, D) for features[i]: (M,), from 1.

    Ties count against the own row.
    """
    reference_vectors = centred_unit_vectors(references, references)
    similarity = centred_unit_vectors(features, references) @ reference_vectors.T
    return (similarity >= similarity.gather(1, own[:, None])).sum(1)


def wilson_interval(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion, k of n."""
    if not 0 <= k <= n or n < 1:
        raise EvaluationError(f"A proportion needs 0 <= k <= n and n >= 1, got k={k}, n={n}.")
    middle = k + z * z / 2
    half = z * math.sqrt(k * (n - k) / n + z * z / 4)
    low = 0.0 if k == 0 else (middle - half) / (n + z * z)
    high = 1.0 if k == n else (middle + half) / (n + z * z)
    return low, high


def proportion(hits: Tensor) -> Proportion:
    """Return the proportion of true values in (n,) booleans."""
    k = int(hits.sum())
    n = len(hits)
    return Proportion(k / n, wilson_interval(k, n), k, n)


def recall_summary(ranks: Tensor) -> Recall:
    """Return recall@1, recall@5 and the median of ranks (n,)."""
    return Recall(
        recall_at_1=proportion(ranks <= 1),
        recall_at_5=proportion(ranks <= 5),
        median_rank=float(ranks.double().median()),
    )


def bootstrap_mean(values: Tensor, seed: int = 0) -> Mean:
    """Return the mean of values (n,) with a bootstrap interval."""
    values = values.double().flatten()
    n = len(values)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(n, (BOOTSTRAP_RESAMPLES, n), generator=generator)
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = values[rows].mean(1).quantile(bounds).tolist()
    return Mean(float(values.mean()), (low, high), n)
