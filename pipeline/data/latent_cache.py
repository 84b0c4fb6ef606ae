"""Images as an autoencoder's latents, encoded once and kept on disk: the posterior's mean and standard deviation."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor

from pipeline.data.dataset import CaptionedImages
from pipeline.data.fingerprint import digest, weights_digest
from pipeline.data.image_ops import as_float
from pipeline.data.map_cache import cache_file, cached_map

ENCODE_BATCH = 8  # images that are encoded together


class LatentCache:
    """The latents of a data set's images, each as it is and, where that is asked for, mirrored; drawn anew at every use.

    An AutoencoderKL says N(mean, std²) of an image, and training on the mean alone would never show what is beside it;
    an AutoencoderTiny says one latent, its std is 0. Kept in float16, 3 digits of values near 1.
    """

    def __init__(self, table: datasets.Dataset, shape: tuple[int, int, int], config, ways: int):
        self.table, self.shape, self.ways = table.with_format("arrow"), shape, ways
        self.shift, self.scale = getattr(config, "shift_factor", None) or 0.0, config.scaling_factor

    def __len__(self) -> int:
        return self.table.num_rows

    def sample(self, rows: Sequence[int] | Tensor, mirrored: Tensor, z: Tensor) -> Tensor:
        """What the network sees of images by row (B, c, h, w): (mean + std z - shift) scale, of the mirrored where so (B,)."""
        stored = b"".join(self.table[[int(row) for row in rows]]["latents"].to_pylist())
        ways = torch.from_numpy(
            np.frombuffer(bytearray(stored), np.float16).reshape(
                len(rows), self.ways, 2, *self.shape
            )
        )
        mean, std = ways[torch.arange(len(rows)), mirrored.long()].float().unbind(1)
        return (mean + std * z.to(mean) - self.shift) * self.scale


def posterior_moments(vae: torch.nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, c, h, w) of what an autoencoder of diffusers says of images (B, 3, H, W) in [-1, 1]."""
    found = vae.encode(pixels.to(vae.dtype))
    if hasattr(found, "latent_dist"):
        return found.latent_dist.mean.float(), found.latent_dist.std.float()
    return found.latents.float(), torch.zeros_like(found.latents, dtype=torch.float32)


@torch.no_grad()
def cache_latents(
    images: CaptionedImages,
    vae: torch.nn.Module,
    cache_dir: str | Path | None = None,
    mirrored: bool = True,
) -> LatentCache:
    """The latents of all images, `mirrored` ones too, from the cache under (images, autoencoder) or computed now."""
    key = digest(
        "latents",
        images.pixels,
        weights_digest(vae),
        *([] if mirrored else ["as they are"]),
    )
    device = next(vae.parameters()).device

    def ways(rows: dict) -> dict:
        pixels = as_float(images.images[rows["row"]].to(device))
        each = [
            torch.stack(posterior_moments(vae, x), 1)
            for x in (pixels, pixels.flip(3))[: 1 + mirrored]
        ]  # (B, 2, c, h, w)
        return {"latents": [one.tobytes() for one in torch.stack(each, 1).half().cpu().numpy()]}

    table = cached_map(
        cache_file(cache_dir, "latents", key),
        datasets.Dataset.from_dict({"row": range(len(images))}),
        ways,
        batch_size=ENCODE_BATCH,
        remove_columns=["row"],
        new_fingerprint=key,
        desc="Encoding images",
        features=datasets.Features({"latents": datasets.Value("binary")}),
    )
    pixels = as_float(images.images[[0]].to(device))
    return LatentCache(
        table, tuple(posterior_moments(vae, pixels)[0].shape[1:]), vae.config, 1 + mirrored
    )
