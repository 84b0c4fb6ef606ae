"""The alignment score: how well images fit captions, by a small dual encoder.

It has the form of CLIP (Radford et al. 2021): two networks that are never trained, here
EfficientNet-Lite0 and MiniLM, and a small head on each. `benchmarks/alignment.py` trains the heads.
"""

from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config import ConfigError
from pipeline.data.image_ops import as_float
from pipeline.diffusion.captions import simplify
from pipeline.evaluation.feature_extractor import FeatureExtractor, extract_features
from pipeline.models.text_encoders import load_text_encoder

# In a clone of the repository; a pip package has no pretrained models.
SHIPPED_ALIGNMENT = Path(__file__).parents[2] / "pretrained" / "alignment"
CAPTION_LENGTH = 32  # tokens
BATCH = 32
HISTOGRAM_SIZE = 32  # pixels a side that a histogram counts
COLOUR_LEVELS = 4  # a channel


def colour_histogram(images: Tensor) -> Tensor:
    """Return the root of the share of 64 colours (N, 64) in images (N, 3, H, W).

    A pixel counts for the colours around it, by its distance to them in each channel.
    """
    size = (HISTOGRAM_SIZE, HISTOGRAM_SIZE)
    pixels = F.interpolate(as_float(images), size, mode="area").flatten(2)
    position = (pixels + 1) / 2 * (COLOUR_LEVELS - 1)
    levels = torch.arange(COLOUR_LEVELS, device=images.device)
    near = (1 - (position[:, :, None] - levels[:, None]).abs()).clamp(min=0)
    counts = torch.einsum("nap,nbp,ncp->nabc", *near.unbind(1)).flatten(1)
    return (counts / pixels.shape[-1]).sqrt()


class Head(nn.Sequential):
    """Maps features (N, D) of a frozen network to unit vectors (N, width)."""

    def __init__(self, features: int, hidden: int, width: int, dropout: float):
        super().__init__(
            nn.Dropout(dropout),
            nn.Linear(features, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, width),
        )
        self.mean = nn.Buffer(torch.zeros(features))
        self.scale = nn.Buffer(torch.ones(features))

    def standardise(self, features: Tensor) -> None:
        """Take the mean and standard deviation that features are standardised by from (N, D)."""
        self.mean.copy_(features.mean(0))
        # Some features are constant.
        self.scale.copy_(1 / (features.std(0) + 1e-3))

    def forward(self, features: Tensor) -> Tensor:
        """Return unit vectors (N, width) of features (N, D)."""
        return F.normalize(super().forward((features - self.mean) * self.scale), dim=-1)


class AlignmentHeads(ModelMixin, ConfigMixin):
    """The trained part: a head for image features and one for caption features."""

    @register_to_config
    def __init__(
        self,
        image_features: int,
        caption_features: int,
        hidden: int = 256,
        width: int = 128,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.image = Head(image_features, hidden, width, dropout)
        self.caption = Head(caption_features, hidden, width, dropout)


class AlignmentModel:
    """Scores images against captions by the cosine of their vectors.

    extractor: images (B, 3, H, W) -> features (B, D). Articles, case and punctuation of captions
    are ignored.
    """

    def __init__(
        self,
        heads: AlignmentHeads,
        extractor: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
    ) -> None:
        self.heads = heads
        self.extractor = extractor
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder

    @classmethod
    def load(cls, folder: str | Path = SHIPPED_ALIGNMENT) -> Self:
        """Load trained heads and the installed networks below them; ConfigError without heads."""
        try:
            heads: Any = AlignmentHeads.from_pretrained(folder, use_safetensors=True)
        except OSError as error:
            raise ConfigError(
                f"{folder} has no alignment model. Run the command in a clone of the repository, "
                "or train one with benchmarks/alignment.py."
            ) from error
        return cls(heads.float().eval(), FeatureExtractor(), *load_text_encoder("minilm"))

    def image_features(self, images: Tensor) -> Tensor:
        """Return what the image head reads (N, D) of images (N, 3, H, W)."""
        features = extract_features(self.extractor, images, BATCH)
        return torch.cat([features, colour_histogram(images)], 1)

    @torch.no_grad()
    def caption_features(self, captions: list[str]) -> Tensor:
        """Return the mean state (N, D) of each caption's tokens."""
        parts = []
        for start in range(0, len(captions), BATCH):
            texts = [simplify(caption) for caption in captions[start : start + BATCH]]
            options = {"padding": True, "truncation": True, "max_length": CAPTION_LENGTH}
            tokens = self.tokenizer(texts, return_tensors="pt", **options)
            states = self.text_encoder(**tokens).last_hidden_state
            mask = tokens.attention_mask[..., None]
            parts.append((states * mask).sum(1) / mask.sum(1))
        return torch.cat(parts)

    @torch.no_grad()
    def score(self, images: Tensor, captions: list[str]) -> Tensor:
        """Return the cosines (N,) of images (N, 3, H, W), uint8 or in [-1, 1], with a caption each.

        `similarities` compares every image with every caption.
        """
        of_images = self.heads.image(self.image_features(images))
        return (of_images * self.heads.caption(self.caption_features(captions))).sum(-1)

    @torch.no_grad()
    def similarities(self, images: Tensor, captions: list[str]) -> Tensor:
        """Return the cosines (N, M) of images (N, 3, H, W) with each of M captions."""
        of_images = self.heads.image(self.image_features(images))
        return of_images @ self.heads.caption(self.caption_features(captions)).T
