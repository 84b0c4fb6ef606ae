"""Copies, seams and diversity of samples."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.image_ops import as_float
from pipeline.evaluation.retrieval import EvaluationError, centred_unit_vectors, proportion


def augment(images: Tensor, seed: int = 0) -> Tensor:
    """Images (N, 3, H, W) as they might have been drawn: moved by up to 3 %, scaled by up to 5 %, noise of 0.05; [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x, n = as_float(images), len(images)
    scale = 1 + 0.05 * (2 * torch.rand(n, generator=generator) - 1)
    move = 0.06 * (2 * torch.rand(n, 2, generator=generator) - 1)  # the picture is 2 wide
    theta = torch.cat([torch.diag_embed(scale[:, None].expand(n, 2)), move[:, :, None]], 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    moved = 1 - F.grid_sample(
        1 - x, grid, mode="bicubic", padding_mode="zeros", align_corners=False
    )  # white around
    return (moved + 0.05 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


def copy_distances(images: Tensor, others: Tensor) -> Tensor:
    """How far images (M, 3, H, W) are from others (N, 3, H, W), (M, N): the root mean square between them at 16 x 16, the
    least over moves by up to 3 %. In units of [-1, 1], whatever an ImageNet network makes of them.
    """
    x, bank = as_float(images), F.interpolate(as_float(others), (16, 16), mode="area").flatten(1)
    (height, width), reach = x.shape[2:], round(0.03 * max(x.shape[2:]))
    padded, least = (
        F.pad(x, [reach] * 4, value=1.0),
        torch.full((len(x), len(bank)), torch.inf),
    )  # white around
    for top in range(2 * reach + 1):
        for left in range(2 * reach + 1):
            moved = padded[:, :, top : top + height, left : left + width]
            torch.minimum(
                least,
                torch.cdist(F.interpolate(moved, (16, 16), mode="area").flatten(1), bank),
                out=least,
            )
    return least / bank.shape[1] ** 0.5


def copy_threshold(images: Tensor) -> float:
    """The copy distance within which 95 % of lightly augmented images (N, 3, H, W) stay from their originals."""
    pairs = zip(augment(images, seed=1).split(64), images.split(64), strict=True)
    return float(
        torch.cat([copy_distances(mine, own).diagonal() for mine, own in pairs]).quantile(0.95)
    )


def copy_rate(images: Tensor, train: Tensor, threshold: float) -> dict:
    """The share of images (M, 3, H, W) nearer to a training image (N, 3, H, W) than the threshold."""
    return proportion(copy_distances(images, train).amin(1) < threshold) | {"threshold": threshold}


def seam_ratio(images: Tensor, patch: int) -> float:
    """Gradient energy at the borders of patch x patch squares over that inside them, of images (N, 3, H, W)."""
    if patch < 2:
        raise EvaluationError(f"patch is {patch}, expected 2 or more: single pixels have no seams")
    x, border, inside = as_float(images).double(), [], []
    for dim in (2, 3):
        energy = x.diff(dim=dim).square().movedim(dim, 0)
        at_border = torch.arange(1, x.shape[dim]) % patch == 0
        border.append(energy[at_border].flatten())
        inside.append(energy[~at_border].flatten())
    return float(torch.cat(border).mean() / torch.cat(inside).mean())


# ---- drawings and their captions


def diversity(features: Tensor, bank: Tensor) -> Tensor:
    """How far apart drawings of one caption are: the mean over pairs of 1 - cosine, centred on a bank (M, D), (N,).

    features (S, N, D) are of S drawings of each of N captions. 0 where all seeds draw the same, 1 where they are unrelated.
    """
    S = len(features)
    if S < 2:
        raise EvaluationError(
            f"features are of {S} drawings a caption, expected 2 or more: draw with more seeds"
        )
    together = (
        centred_unit_vectors(features, bank).sum(0).square().sum(-1)
    )  # S + the sum over ordered pairs of their cosine
    return 1 - (together - S) / (S * (S - 1))
