"""Copies of training images, seams between patches, and diversity of samples."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.image_ops import as_float
from pipeline.evaluation.retrieval import EvaluationError, centred_unit_vectors, proportion
from pipeline.runs.results import CopyRate


def augment(images: Tensor, seed: int = 0) -> Tensor:
    """Return images (N, 3, H, W) moved by up to 3 %, scaled by up to 5 %, with noise of 0.05.

    The result is in [-1, 1]: about as far from the originals as a good sample.
    """
    generator = torch.Generator().manual_seed(seed)
    x = as_float(images)
    n = len(images)
    scale = 1 + 0.05 * (2 * torch.rand(n, generator=generator) - 1)
    # An image is 2 wide in the units of the grid.
    move = 0.06 * (2 * torch.rand(n, 2, generator=generator) - 1)
    theta = torch.cat([torch.diag_embed(scale[:, None].expand(n, 2)), move[:, :, None]], 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    # Inverted, so that what moves in from outside is white.
    inverse = F.grid_sample(1 - x, grid, mode="bicubic", align_corners=False)
    noise = torch.randn(x.shape, generator=generator)
    return (1 - inverse + 0.05 * noise).clamp(-1, 1)


def copy_distances(images: Tensor, others: Tensor) -> Tensor:
    """Return the distances (M, N) of images (M, 3, H, W) to others (N, 3, H, W).

    A distance is the root mean square difference at 16 x 16, in units of [-1, 1], the least over
    moves of the image by up to 3 %.
    """

    def thumbnails(x: Tensor) -> Tensor:
        return F.interpolate(x, (16, 16), mode="area").flatten(1)

    x = as_float(images)
    targets = thumbnails(as_float(others))
    height, width = x.shape[2:]
    reach = round(0.03 * max(height, width))
    white_around = F.pad(x, [reach] * 4, value=1.0)
    least = torch.full((len(x), len(targets)), torch.inf)
    for top in range(2 * reach + 1):
        for left in range(2 * reach + 1):
            moved = white_around[:, :, top : top + height, left : left + width]
            least = torch.minimum(least, torch.cdist(thumbnails(moved), targets))
    return least / targets.shape[1] ** 0.5


def copy_threshold(images: Tensor) -> float:
    """Return the distance within which 95 % of augmented images (N, 3, H, W) are recognised."""
    pairs = zip(augment(images, seed=1).split(64), images.split(64), strict=True)
    distances = [copy_distances(augmented, own).diagonal() for augmented, own in pairs]
    return float(torch.cat(distances).quantile(0.95))


def copy_rate(images: Tensor, train: Tensor, threshold: float) -> CopyRate:
    """Return how many images (M, 3, H, W) are within a threshold of a training image."""
    found = proportion(copy_distances(images, train).amin(1) < threshold)
    return CopyRate(found.value, found.interval, found.k, found.n, threshold)


def seam_ratio(images: Tensor, patch: int) -> float:
    """Return the gradient energy at the borders of patch x patch squares over that inside them."""
    if patch < 2:
        raise EvaluationError(f"patch must be at least 2, got {patch}: a pixel has no seams.")
    x = as_float(images).double()
    border = []
    inside = []
    for dim in (2, 3):
        energy = x.diff(dim=dim).square().movedim(dim, 0)
        at_border = torch.arange(1, x.shape[dim]) % patch == 0
        border.append(energy[at_border].flatten())
        inside.append(energy[~at_border].flatten())
    return float(torch.cat(border).mean() / torch.cat(inside).mean())


def diversity(features: Tensor, references: Tensor) -> Tensor:
    """Return how far apart the samples of each caption are: (N,).

    It is the mean over pairs of seeds of 1 - cosine, centred on reference features (M, D):
    0 where all seeds agree, 1 where they are unrelated.

    features: (S, N, D), of S samples of each of N captions.
    """
    S = len(features)
    if S < 2:
        raise EvaluationError(f"Diversity needs 2 or more samples a caption, got {S}.")
    # S plus the sum over ordered pairs of their cosine.
    total = centred_unit_vectors(features, references).sum(0).square().sum(-1)
    return 1 - (total - S) / (S * (S - 1))
