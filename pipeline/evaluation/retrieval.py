"""What drawings are measured by: ranks, shares, copies, seams, distances of feature sets, likelihood, errors, diversity.

Images are uint8 (N, 3, H, W) or floats in [-1, 1]; features (N, D) are what some network makes of them. Numbers in brackets
are the equations of docs/equations.md.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

BOOTSTRAP_RESAMPLES = 1000  # of a bootstrap


class EvaluationError(ValueError):
    """An evaluation that cannot be made as asked."""


def centred_unit_vectors(features: Tensor, bank: Tensor) -> Tensor:
    """Unit vectors of features less the bank's mean, float64: their products are the judge's similarity."""
    return F.normalize(features.double() - bank.double().mean(0), dim=-1)


def retrieval_ranks(features: Tensor, bank: Tensor, own: Tensor) -> Tensor:
    """The rank of row own[i] of the bank (N, D) for features[i], (M,) from 1; ties count against."""
    similarity = centred_unit_vectors(features, bank) @ centred_unit_vectors(bank, bank).T
    return (similarity >= similarity.gather(1, own[:, None])).sum(1)


def wilson_interval(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, k successes of n."""
    if not 0 <= k <= n or n < 1:
        raise EvaluationError(f"a share needs 0 <= k <= n and n >= 1, got k={k}, n={n}")
    middle, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    low, high = (middle - half) / (n + z * z), (middle + half) / (n + z * z)
    return (0.0 if k == 0 else low), (1.0 if k == n else high)


def proportion(hits: Tensor) -> dict:
    """A share of (n,) booleans with its interval."""
    k, n = int(hits.sum()), len(hits)
    return {"share": k / n, "interval": list(wilson_interval(k, n)), "k": k, "n": n}


def recall_summary(ranks: Tensor) -> dict:
    """How often the own picture is first, and among the first five; the median rank."""
    return {
        "first": proportion(ranks <= 1),
        "first_five": proportion(ranks <= 5),
        "median_rank": float(ranks.double().median()),
    }


def bootstrap_mean(values: Tensor, seed: int = 0) -> dict:
    """The mean of values (n,) with the 95 % interval of a bootstrap over them."""
    values = values.double().flatten()
    rows = torch.randint(
        len(values),
        (BOOTSTRAP_RESAMPLES, len(values)),
        generator=torch.Generator().manual_seed(seed),
    )
    low, high = (
        values[rows].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    )
    return {"mean": float(values.mean()), "interval": [low, high], "n": len(values)}
