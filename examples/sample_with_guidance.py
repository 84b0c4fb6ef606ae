"""Sample two prompts at several guidance weights w, equation (17), and save them as a grid.

Each row has one w and each column one prompt with the same noise, so only guidance differs.
w = -1 ignores the prompt, w = 0 follows it without guidance. The last row guides only while the
noise level is between 0.2 and 0.9.
"""

import argparse
from pathlib import Path

from diffusers.utils import make_image_grid
from PIL import Image

from pipeline import interval, load_pipeline

PROMPTS = ["red heart", "green cat"]
WEIGHTS = [-1.0, 0.0, 1.0, 3.0, interval(3.0, 0.2, 0.9)]


def main(argv: list[str] | None = None) -> None:
    """Sample the grid and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pretrained/emoji", help="a run, a folder or a Hub id")
    parser.add_argument("--output", type=Path, default=Path("guidance.png"))
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args(argv)

    pipe = load_pipeline(options.model)
    pipe.set_progress_bar_config(disable=True)
    images = []
    for w in WEIGHTS:
        images += pipe(PROMPTS, w=w, seed=7, num_inference_steps=options.steps).images
    grid = make_image_grid(images, rows=len(WEIGHTS), cols=len(PROMPTS))
    grid.resize((4 * grid.width, 4 * grid.height), Image.Resampling.NEAREST).save(options.output)


if __name__ == "__main__":
    main()
