"""Cached latents are the posterior of each image or its mirror image."""

import torch

from pipeline.data.image_ops import as_float
from pipeline.data.latent_cache import cache_latents, posterior_moments


def test_sample_is_the_posterior_of_the_image_or_its_mirror(ramps, vae, tmp_path):
    """(mean + std z - shift) scale, up to the rounding of float16."""
    latents = cache_latents(ramps, vae, tmp_path)
    rows = torch.tensor([2, 0, 2])
    mirrored = torch.tensor([False, True, True])
    z = torch.randn(3, *latents.shape, generator=torch.Generator().manual_seed(0))
    pixels = as_float(ramps.images[rows])
    pixels[mirrored] = pixels[mirrored].flip(-1)
    with torch.no_grad():
        mean, std = posterior_moments(vae, pixels)
    expected = (mean + std * z) * vae.config.scaling_factor
    assert torch.allclose(latents.sample(rows, mirrored, z), expected, atol=2e-3)
    assert not torch.allclose(latents.sample(rows, ~mirrored, z), expected, atol=2e-2)


def test_cache_latents_encodes_once(ramps, vae, tmp_path, monkeypatch):
    latents = cache_latents(ramps, vae, tmp_path)
    assert len(latents) == 3
    # Only the first image is encoded again, for the shape.
    shapes = []
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda x: shapes.append(x.shape[0]) or encode(x))
    cache_latents(ramps, vae, tmp_path)
    assert shapes == [1]
