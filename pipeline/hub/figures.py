"""Draw the figures of a model card and collect its sample images."""

import shutil
from pathlib import Path

import matplotlib
import torch
from PIL import Image

from pipeline.config import Config
from pipeline.data.dataset import CaptionedImages
from pipeline.data.image_ops import as_float
from pipeline.data.sampler import evenly_spaced
from pipeline.diffusion.exact_denoiser import irreducible_loss
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.runs.folder import IMAGES_FOLDER, RunFolder

FLOOR_IMAGES = 512  # of the irreducible error


def collect_images(config: Config, run: RunFolder) -> None:
    """Fill the run's images/ with the newest samples, one image a prompt, and the figures.

    The card shows the prompts' images above code that samples at the default w. They are cropped
    from the samples at that w, and left out if there are none.
    """
    sample = config.sample
    target = run.folder / IMAGES_FOLDER
    target.mkdir(exist_ok=True)
    for old in target.glob("prompt-*.png"):
        old.unlink()
    sample_files = run.sample_files()
    if sample_files:
        _step, newest = sample_files[-1]
        shutil.copyfile(newest, target / "samples.png")
        if sample.default_w in sample.w:
            row = sample.w.index(sample.default_w)
            with Image.open(newest) as grid:
                width = grid.width // len(sample.prompts)
                height = grid.height // len(sample.w)
                for i in range(len(sample.prompts)):
                    box = (i * width, row * height, (i + 1) * width, (row + 1) * height)
                    grid.crop(box).save(target / f"prompt-{i}.png")
    for figure in run.figures.glob("*.png"):
        shutil.copyfile(figure, target / figure.name)


def plot_training(run: RunFolder, images: CaptionedImages, pipe: TextToImagePipeline) -> Path:
    """Plot the loss by step and the x_0 error by timestep into figures/training.png.

    Without captions, no denoiser has a lower error than the dashed line.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    history = run.history()
    steps = [record for record in history if record.get("loss") is not None]
    checks = [record for record in history if "train_x_0_error" in record]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    losses = [record["loss"] for record in steps]
    left.plot([record["step"] for record in steps], losses, color="0.7", label="training")
    for split, name in (("train", "train"), ("held_out", "held-out")):
        logged = [record for record in checks if f"{split}_loss" in record]
        if logged:
            losses = [record[f"{split}_loss"] for record in logged]
            label = f"{name} grid, averaged weights"
            left.plot([record["step"] for record in logged], losses, marker=".", label=label)
    left.set(xlabel="step", ylabel="loss", yscale="log", title="Loss")
    left.legend()
    if checks:
        timesteps = [int(t) for t in checks[-1]["train_x_0_error"]]
        for split, name in (("train", "train"), ("held_out", "held-out")):
            if f"{split}_x_0_error" in checks[-1]:
                errors = list(checks[-1][f"{split}_x_0_error"].values())
                right.plot(timesteps, errors, marker=".", label=name)
        lowest = min(min(line.get_ydata()) for line in right.get_lines())
        rows = evenly_spaced(FLOOR_IMAGES, len(images))
        # On the CPU, since MPS has no float64.
        x_0 = pipe.encode(as_float(images.images[rows].to(pipe.device))).cpu()
        floor = [irreducible_loss(x_0, pipe.scheduler, t).mean().item() for t in timesteps]
        label = f"irreducible without captions (exact denoiser of {len(rows)} images)"
        right.plot(timesteps, floor, "k--", label=label)
        right.set(xlabel="timestep", ylabel="mean squared error of x_0", yscale="log")
        right.set(title="Error by timestep")
        right.set_ylim(bottom=lowest / 5)  # the irreducible error falls to 0
        right.legend()
    path = run.figures / "training.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


@torch.no_grad()
def plot_strips(
    pipe: TextToImagePipeline,
    prompts: list[str],
    seen: set[str],
    path: Path,
    *,
    w: float,
    seed: int,
    steps: int = 50,
    eta: float = 1.0,
    columns: int = 8,
) -> Path:
    """Plot the way from noise to image, a row a prompt: x_t left, the current x_0 of (15) right.

    seen: the captions of the data; other prompts are labelled as unseen.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = set(torch.linspace(0, steps - 1, columns).round().long().tolist())
    strips = []
    sampling = pipe.denoise(list(prompts), w=w, seed=seed, num_inference_steps=steps, eta=eta)
    for i, step in enumerate(sampling):
        if i in shown and step.x_0_hat is not None:
            strips.append((step.t, pipe.decode(step.x_t), pipe.decode(step.x_0_hat)))
    size = (2 * columns + 1, 1.25 * len(prompts))
    widths = [1] * columns + [0.3] + [1] * columns
    figure, axes = plt.subplots(
        len(prompts), 2 * columns + 1, figsize=size, width_ratios=widths, squeeze=False
    )
    for row, prompt in enumerate(prompts):
        for column, (t, x_t, x_0_hat) in enumerate(strips):
            for ax, x in ((axes[row, column], x_t), (axes[row, columns + 1 + column], x_0_hat)):
                pixels = ((x[row] + 1) / 2).clamp(0, 1).permute(1, 2, 0)
                ax.imshow(pixels.float().cpu().numpy())
                if row == 0:
                    ax.set_title(f"t = {int(t)}", fontsize=8)
        label = prompt if prompt in seen else f"{prompt}\n(in no training image)"
        place = {"ha": "right", "va": "center", "transform": axes[row, 0].transAxes}
        axes[row, 0].text(-0.15, 0.5, label, fontsize=10, **place)
    for ax in axes.flat:
        ax.set_axis_off()
    figure.text(0.33, 0.0, "x_t", ha="center")
    figure.text(0.73, 0.0, "x̂_0, the current prediction (15)", ha="center")
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)
    return path
