"""Distances between two sets of features: KID and Fréchet distance."""

import importlib.util
import warnings

import torch
from torch import Tensor, nn

from pipeline.evaluation.retrieval import EvaluationError

MIN_SAMPLES = 4  # rows of a distance, whose error is read from halves
JACKKNIFE_HALVES = 50  # random halves that an error is read from


# ---- distances between two sets of features


class PrecomputedFeatures(nn.Identity):
    """The network that torchmetrics asks for, where features (N, D) are known already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


@torch.no_grad()
def extract_features(network: nn.Module, images: Tensor, batch: int = 32) -> Tensor:
    """What any network (B, 3, H, W) -> (B, D) makes of images (N, 3, H, W): (N, D), float32 on the CPU."""
    return torch.cat([network(part).float().cpu() for part in images.split(batch)])


def load_inception() -> nn.Module:
    """Inception-v3 of the FID paper, uint8 (B, 3, H, W) -> (B, 2048), where torch-fidelity is installed."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise EvaluationError(
            "inception-v3 is not installed, expected torch-fidelity: pip install torch-fidelity torchvision, "
            "or use efficientnet-lite0"
        )
    from torchmetrics.image.fid import NoTrainInceptionV3

    return NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"]).eval()


def require_equal_sizes(real: Tensor, drawn: Tensor) -> int:
    """N of two feature sets (N, D); EvaluationError unless it is the same, and 4 or more."""
    if real.shape != drawn.shape or real.ndim != 2 or len(real) < MIN_SAMPLES:
        raise EvaluationError(
            f"features are {tuple(real.shape)} and {tuple(drawn.shape)}, expected twice the same (N, D) with "
            f"N >= {MIN_SAMPLES}: distances of sets are compared at equal N only"
        )
    return len(real)


def kid(real: Tensor, drawn: Tensor, seed: int = 0) -> dict:
    """The kernel distance of real and drawn features (N, D) (Binkowski et al. 2018), unbiased for independent sets.

    Drawings of the real pictures' own captions are not: they resemble theirs, which lowers it by up to 2/N of the kernel.
    `value` is the squared mean discrepancy of all of them under (x . y / D + 1)^3. `error` is its standard error by the
    delete-half jackknife, the deviation over random halves of both sets; `interval` is 1.96 errors to either side.
    """
    from torchmetrics.image.kid import KernelInceptionDistance  # here: its import takes a second

    n, found = require_equal_sizes(real, drawn), []
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save")
        torch.manual_seed(seed)  # torchmetrics draws its subsets from the global generator
        for subsets, size in ((1, n), (JACKKNIFE_HALVES, n // 2)):
            metric = KernelInceptionDistance(
                PrecomputedFeatures(real.shape[1]), subsets=subsets, subset_size=size
            )
            metric.update(real.double(), real=True)
            metric.update(drawn.double(), real=False)
            found.append(metric.compute())
    (value, _), (_, error) = found
    return {
        "value": value.item(),
        "error": error.item(),
        "n": n,
        "interval": [(value - 1.96 * error).item(), (value + 1.96 * error).item()],
    }


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)) of features (N, D) and (N, D), Gaussians with their means and covariances.

    Biased upwards at small N: only values at the same N and D compare (Heusel et al. 2017).
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    require_equal_sizes(x, y)
    metric = FrechetInceptionDistance(PrecomputedFeatures(x.shape[1]))
    metric.update(x.double(), real=True)
    metric.update(y.double(), real=False)
    return metric.compute().item()


def random_halves(n: int) -> tuple[Tensor, Tensor]:
    """Two disjoint random halves of n rows, of equal size, the same ones every time."""
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return rows[: n // 2], rows[n // 2 : 2 * (n // 2)]
