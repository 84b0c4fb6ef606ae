"""Cached latents are the posterior of each image or its mirror image."""

import pytest
import torch
from datasets_on_disk import encode_image
from diffusers import AutoencoderKL
from PIL import Image
from tiny import seeded

from pipeline.data.image_ops import as_float
from pipeline.data.latent_cache import cache_latents, posterior_moments


@pytest.fixture
def images(load, tmp_path):
    """Three ramps from left to right, 16 x 16."""
    ramp = Image.linear_gradient("L").transpose(Image.Transpose.ROTATE_90).resize((16, 16))
    for i in range(3):
        shade = ramp.point(lambda value, i=i: min(255, value + 40 * i))
        (tmp_path / "set" / f"{i}.png").write_bytes(encode_image(shade))
    return load(resolution=16)


@pytest.fixture
def vae():
    return seeded(lambda: AutoencoderKL(block_out_channels=(8,), norm_num_groups=4))


def test_sample_is_the_posterior_of_the_image_or_its_mirror(images, vae, tmp_path):
    """(mean + std z - shift) scale, up to the rounding of float16."""
    latents = cache_latents(images, vae, tmp_path)
    rows = torch.tensor([2, 0, 2])
    mirrored = torch.tensor([False, True, True])
    z = torch.randn(3, *latents.shape, generator=torch.Generator().manual_seed(0))
    pixels = as_float(images.images[rows])
    pixels[mirrored] = pixels[mirrored].flip(-1)
    with torch.no_grad():
        mean, std = posterior_moments(vae, pixels)
    expected = (mean + std * z) * vae.config.scaling_factor
    assert torch.allclose(latents.sample(rows, mirrored, z), expected, atol=2e-3)
    assert not torch.allclose(latents.sample(rows, ~mirrored, z), expected, atol=2e-2)


def test_cache_latents_encodes_once(images, vae, tmp_path, monkeypatch):
    latents = cache_latents(images, vae, tmp_path)
    assert len(latents) == 3
    # Only the first image is encoded again, for the shape.
    shapes = []
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda x: shapes.append(x.shape[0]) or encode(x))
    cache_latents(images, vae, tmp_path)
    assert shapes == [1]
