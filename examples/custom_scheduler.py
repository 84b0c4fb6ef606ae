"""Sample the same noise with four schedulers and compare the images.

A scheduler is replaced after loading. Ours and diffusers' read the same configuration, so each is
built from that of the model, and prediction type, betas and spacing carry over. The two DDIMs
agree if the number of steps divides T = 1000. Otherwise diffusers' steps miss its own timesteps.
"""

import argparse
from pathlib import Path

import numpy as np
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.utils import make_image_grid
from PIL import Image

from pipeline import DDPMScheduler, load_pipeline

PROMPTS = ["red heart", "green cat", "hot dog"]


def main(argv: list[str] | None = None) -> None:
    """Sample with each scheduler, print the distances and save a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pretrained/emoji", help="a run, a folder or a Hub id")
    parser.add_argument("--output", type=Path, default=Path("schedulers.png"))
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args(argv)

    pipe = load_pipeline(options.model)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    schedulers = {
        "DDIM of equation (19), eta = 0": (DDPMScheduler.from_config(config), 0.0),
        "DDIM of diffusers": (DDIMScheduler.from_config(config), 0.0),
        "DPM-Solver++ of diffusers": (DPMSolverMultistepScheduler.from_config(config), None),
        "ancestral, equation (16)": (DDPMScheduler.from_config(config), 1.0),
    }
    images = []
    for name, (scheduler, eta) in schedulers.items():
        pipe.scheduler = scheduler
        row = pipe(PROMPTS, seed=7, eta=eta, num_inference_steps=options.steps).images
        images += row
        difference = np.stack(row).astype(float) - np.stack(images[: len(PROMPTS)])
        print(f"{name}: {np.abs(difference).mean():.2f} of 255 away from the first row")
    grid = make_image_grid(images, rows=len(schedulers), cols=len(PROMPTS))
    grid.resize((4 * grid.width, 4 * grid.height), Image.Resampling.NEAREST).save(options.output)


if __name__ == "__main__":
    main()
