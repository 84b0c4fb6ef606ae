"""Distances between two sets of features: KID and Fréchet distance."""

import importlib.util
import warnings

import torch
from torch import Tensor, nn

from pipeline.evaluation.retrieval import EvaluationError
from pipeline.runs.results import Kid

MIN_SAMPLES = 4  # the error of a KID comes from halves of both sets
JACKKNIFE_HALVES = 50


class PrecomputedFeatures(nn.Identity):
    """The feature network that torchmetrics needs, for features (N, D) that are known already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def load_inception() -> nn.Module:
    """Return the FID paper's Inception-v3, uint8 (B, 3, H, W) -> (B, 2048)."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise EvaluationError(
            "inception-v3 is not installed. Run `pip install torch-fidelity torchvision`, or use "
            "efficientnet-lite0."
        )
    from torchmetrics.image.fid import NoTrainInceptionV3

    return NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"]).eval()


def require_equal_sizes(real: Tensor, samples: Tensor) -> int:
    """Return N of two feature sets (N, D); EvaluationError unless both have the same N >= 4."""
    if real.shape != samples.shape or real.ndim != 2 or len(real) < MIN_SAMPLES:
        raise EvaluationError(
            f"Features are {tuple(real.shape)} and {tuple(samples.shape)}, but distances compare "
            f"two sets of the same shape (N, D) with N >= {MIN_SAMPLES}."
        )
    return len(real)


def kid(real: Tensor, samples: Tensor, seed: int = 0) -> Kid:
    """Return the kernel inception distance of features (N, D) (Binkowski et al. 2018).

    The value is the squared maximum mean discrepancy under (x . y / D + 1)^3, unbiased for
    independent sets. Samples of the real images' own captions resemble them, which lowers it by
    up to 2/N of the kernel. The error is the delete-half jackknife's standard error; the interval
    is 1.96 errors to either side.
    """
    # Importing it takes a second.
    from torchmetrics.image.kid import KernelInceptionDistance

    n = require_equal_sizes(real, samples)
    results = []
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save")
        # torchmetrics chooses its subsets by the global generator.
        torch.manual_seed(seed)
        for subsets, size in ((1, n), (JACKKNIFE_HALVES, n // 2)):
            network = PrecomputedFeatures(real.shape[1])
            metric = KernelInceptionDistance(network, subsets=subsets, subset_size=size)
            metric.update(real.double(), real=True)
            metric.update(samples.double(), real=False)
            results.append(metric.compute())
    value = results[0][0].item()
    error = results[1][1].item()
    return Kid(value, error, (value - 1.96 * error, value + 1.96 * error), n)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Return |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)) of features (N, D) and (N, D).

    Biased upwards at small N: compare only values at the same N and D (Heusel et al. 2017).
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    require_equal_sizes(x, y)
    metric = FrechetInceptionDistance(PrecomputedFeatures(x.shape[1]))
    metric.update(x.double(), real=True)
    metric.update(y.double(), real=False)
    return metric.compute().item()


def random_halves(n: int) -> tuple[Tensor, Tensor]:
    """Return two disjoint random halves of n rows, of equal size, always the same ones."""
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return rows[: n // 2], rows[n // 2 : 2 * (n // 2)]
