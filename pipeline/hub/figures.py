"""The figures and sample images of a model card."""

import shutil
from pathlib import Path

import matplotlib
import torch
from PIL import Image

from pipeline.config import Config
from pipeline.data.image_ops import as_float
from pipeline.data.sampler import evenly_spaced
from pipeline.diffusion.exact_denoiser import irreducible_loss
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.runs.folder import IMAGES_FOLDER, RunFolder


def collect_images(config: Config, run: RunFolder) -> None:
    """The pictures of a card, `images/`: the newest samples, each prompt's own of those at the default w, and the figures.

    The prompts' own are shown above code that draws at the default w: where the samples have none at it, there are none.
    """
    target, sample = run.folder / IMAGES_FOLDER, config.sample
    target.mkdir(exist_ok=True)
    for old in target.glob("prompt-*.png"):
        old.unlink()
    if drawn := run.sample_files():
        _step, newest = drawn[-1]
        shutil.copyfile(newest, target / "samples.png")
    if drawn and sample.default_w in sample.w:
        row = sample.w.index(sample.default_w)
        with Image.open(newest) as grid:
            width, height = grid.width // len(sample.prompts), grid.height // len(sample.w)
            for i in range(len(sample.prompts)):
                grid.crop((i * width, row * height, (i + 1) * width, (row + 1) * height)).save(
                    target / f"prompt-{i}.png"
                )
    for figure in run.figures.glob("*.png"):
        shutil.copyfile(figure, target / figure.name)


def plot_training(run: RunFolder, images, pipe: TextToImagePipeline) -> Path:
    """`figures/training.png`: the loss, and the x_0 error by timestep above what no denoiser without captions can beat."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    history = run.history()
    steps = [r for r in history if r.get("loss") is not None]
    checks = [r for r in history if "train_x_0_error" in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="0.7", label="training")
    for split in ("train", "held_out"):
        line = [(r["step"], r[f"{split}_loss"]) for r in checks if f"{split}_loss" in r]
        if line:
            left.plot(
                *zip(*line, strict=True),
                marker=".",
                label=f"{split.replace('_', '-')} grid, averaged weights",
            )
    left.set(xlabel="step", ylabel="loss", yscale="log", title="Loss")
    left.legend()
    if checks:
        grid = [int(t) for t in checks[-1]["train_x_0_error"]]
        for split in ("train", "held_out"):
            if f"{split}_x_0_error" in checks[-1]:
                right.plot(
                    grid,
                    list(checks[-1][f"{split}_x_0_error"].values()),
                    marker=".",
                    label=split.replace("_", "-"),
                )
        rows = evenly_spaced(512, len(images))
        x_0 = pipe.encode(as_float(images.images[rows].to(pipe.device))).cpu()  # MPS has no float64
        floor = [irreducible_loss(x_0, pipe.scheduler, t).mean().item() for t in grid]
        right.plot(
            grid,
            floor,
            "k--",
            label=f"irreducible without captions (exact denoiser of {len(rows)} images)",
        )
        lowest = min(
            min(line.get_ydata()) for line in right.get_lines()[:-1]
        )  # the exact denoiser's falls to nothing
        right.set(
            xlabel="timestep",
            ylabel="mean squared error of x_0",
            yscale="log",
            title="Error by timestep",
        )
        right.set_ylim(bottom=lowest / 5)
        right.legend()
    path = run.figures / "training.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


@torch.no_grad()
def plot_strips(
    pipe,
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
    """The way from noise to picture, a row a prompt: x_t on the left, the current x_0 of (15) on the right.

    Prompts that are not in `seen`, the captions of the data, are labelled so.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = set(torch.linspace(0, steps - 1, columns).round().long().tolist())
    kept = [
        (step.t, pipe.decode(step.x_t), pipe.decode(step.x_0_hat))
        for i, step in enumerate(
            pipe.denoise(list(prompts), w=w, seed=seed, num_inference_steps=steps, eta=eta)
        )
        if i in shown
    ]
    figure, axes = plt.subplots(
        len(prompts),
        2 * columns + 1,
        figsize=(2 * columns + 1, 1.25 * len(prompts)),
        width_ratios=[1] * columns + [0.3] + [1] * columns,
        squeeze=False,
    )
    for row, prompt in enumerate(prompts):
        for column, (t, x_t, x_0_hat) in enumerate(kept):
            for place, x in ((column, x_t), (columns + 1 + column, x_0_hat)):
                axes[row, place].imshow(
                    ((x[row] + 1) / 2).clamp(0, 1).permute(1, 2, 0).float().cpu().numpy()
                )
                if row == 0:
                    axes[row, place].set_title(f"t = {int(t)}", fontsize=8)
        note = "" if prompt in seen else "\n(in no training picture)"
        axes[row, 0].text(
            -0.15,
            0.5,
            prompt + note,
            ha="right",
            va="center",
            transform=axes[row, 0].transAxes,
            fontsize=10,
        )
    for ax in axes.flat:
        ax.set_axis_off()
    figure.text(0.33, 0.0, "x_t", ha="center")
    figure.text(0.73, 0.0, "x̂_0, the current prediction (15)", ha="center")
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)
    return path
