"""Latents of images, encoded once: mean and standard deviation of the autoencoder's posterior."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from pipeline.data.dataset import CaptionedImages
from pipeline.data.fingerprint import digest, weights_digest
from pipeline.data.image_ops import as_float, as_uint8
from pipeline.data.map_cache import cache_file, cached_map, read_arrays

# Images that are encoded together.
ENCODE_BATCH = 8


class LatentCache:
    """The cached posteriors of a dataset's images and, if views is 2, of their mirror images.

    An AutoencoderKL gives N(mean, std²) for an image; training on the mean alone would never show
    the values around it. An AutoencoderTiny gives one latent, so its std is 0. Stored in float16.
    """

    def __init__(
        self, table: datasets.Dataset, shape: tuple[int, ...], config: Mapping, views: int
    ) -> None:
        self.table = table.with_format("arrow")
        self.shape = shape
        self.views = views
        self.shift = config.get("shift_factor") or 0.0
        self.scale = config["scaling_factor"]

    def __len__(self) -> int:
        return self.table.num_rows

    def sample(self, rows: Sequence[int] | Tensor, mirrored: Tensor, z: Tensor) -> Tensor:
        """Return (mean + std z - shift) scale by row, (B, c, h, w); of the mirrored where (B,)."""
        index = [int(row) for row in rows]
        shape = (self.views, 2, *self.shape)
        posteriors = read_arrays(self.table, "latents", index, np.float16, shape)
        chosen = posteriors[torch.arange(len(index)), mirrored.long()].float()
        mean, std = chosen.unbind(1)
        return (mean + std * z.to(mean) - self.shift) * self.scale


def posterior_moments(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (B, c, h, w) of diffusers' q(z | pixels in [-1, 1])."""
    encoded = vae.encode(pixels.to(vae.dtype))
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
    mean = encoded.latents.float()
    return mean, torch.zeros_like(mean)


@torch.no_grad()
def restore_images(vae: Any, images: Tensor) -> Tensor:
    """Return uint8 images (N, 3, H, W) after encoding and decoding, as uint8 on the CPU."""
    restored = []
    for batch in images.split(ENCODE_BATCH):
        decoded = vae(as_float(batch.to(vae.device))).sample
        restored.append(as_uint8((decoded.float().clamp(-1, 1) + 1) / 2).cpu())
    return torch.cat(restored)


@torch.no_grad()
def cache_latents(
    images: CaptionedImages,
    vae: Any,
    cache_dir: str | Path | None = None,
    mirrored: bool = True,
) -> LatentCache:
    """Return the latents of all images, cached by (pixels, autoencoder, mirrored or not)."""
    options = [] if mirrored else ["as they are"]
    key = digest("latents", images.pixels, weights_digest(vae), *options)
    device = next(vae.parameters()).device

    def encode(batch: dict) -> dict:
        pixels = as_float(images.images[batch["row"]].to(device))
        views = [pixels, pixels.flip(3)] if mirrored else [pixels]
        # (B, views, 2, c, h, w)
        moments = torch.stack([torch.stack(posterior_moments(vae, x), 1) for x in views], 1)
        return {"latents": [array.tobytes() for array in moments.half().cpu().numpy()]}

    table = cached_map(
        cache_file(cache_dir, "latents", key),
        datasets.Dataset.from_dict({"row": range(len(images))}),
        encode,
        batch_size=ENCODE_BATCH,
        remove_columns=["row"],
        new_fingerprint=key,
        desc="Encoding images",
        features=datasets.Features({"latents": datasets.Value("binary")}),
    )
    mean, _ = posterior_moments(vae, as_float(images.images[[0]].to(device)))
    return LatentCache(table, tuple(mean.shape[1:]), vae.config, 1 + mirrored)
