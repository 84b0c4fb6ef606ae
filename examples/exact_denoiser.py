"""Diffusion without training: sample with the exact denoiser of eight small images.

The best possible denoiser of a finite set of images has a closed form. It replaces the network
here, and sampling (16) then returns images of the set: a perfect denoiser only memorises.
"""

import argparse
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image

from pipeline import DDPMScheduler, ExactDenoiser


def stripes(size: int = 16) -> torch.Tensor:
    """Return eight images (8, 3, size, size) in [-1, 1]: stripes of four widths, two directions."""
    waves = [
        torch.sin((torch.arange(size) + 0.5) * torch.pi / width).sign() for width in (2, 3, 4, 8)
    ]
    across = torch.stack(waves)[:, None, None, :].expand(-1, 3, size, -1)
    return torch.cat([across, across.transpose(2, 3)])


def main(argv: list[str] | None = None) -> None:
    """Sample from noise and save the set above the samples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("exact.png"))
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args(argv)

    x_0 = stripes()
    scheduler = DDPMScheduler(prediction_type="sample", timestep_spacing="trailing")
    scheduler.set_timesteps(options.steps)
    denoiser = ExactDenoiser(x_0, scheduler)
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(x_0.shape, generator=generator)
    for t in scheduler.timesteps:
        x_0_hat = denoiser(x_t, t).sample
        x_t = scheduler.step(x_0_hat, t, x_t, generator=generator).prev_sample

    pixels = ((torch.cat([x_0, x_t]).clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1)
    images = [Image.fromarray(image).resize((64, 64), 0) for image in pixels.numpy()]
    make_image_grid(images, rows=2, cols=len(x_0)).save(options.output)
    nearest = torch.cdist(x_t.flatten(1), x_0.flatten(1)).min(1)
    print(
        f"samples show images {nearest.indices.tolist()}, at most {nearest.values.max():.3f} away"
    )


if __name__ == "__main__":
    main()
