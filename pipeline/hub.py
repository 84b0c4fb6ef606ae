"""What a model is shown with, its card and its curves, and how a saved one is found and loaded."""

import subprocess
from pathlib import Path

import matplotlib
import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import ModelCard, ModelCardData

from pipeline import emoji, models, sample
from pipeline import run as runs
from pipeline.captions import CaptionWhitening
from pipeline.config import Config, load_file
from pipeline.exact import irreducible_loss
from pipeline.run import Run
from pipeline.text_to_image import TextToImagePipeline

ATTRIBUTION = "Emoji pictures: Twemoji, (c) Twitter, Inc and other contributors, CC-BY 4.0."


def newest(root: str | Path = "runs", shipped: str | Path = "pretrained/emoji") -> Path | None:
    """The run that was last written to and can be drawn with, else the shipped model, else None."""
    found = [run for run in map(Run, Path(root).glob("*")) if (run.pipeline / "model_index.json").is_file() or run.steps()]
    if found:
        return max(found, key=lambda run: run.metrics.stat().st_mtime if run.metrics.exists() else 0).folder
    return Path(shipped) if (Path(shipped) / "model_index.json").is_file() else None


def load(model: str | Path) -> TextToImagePipeline:
    """The pipeline of a finished run's folder or of a saved pipeline's, from safetensors alone and with no code of its own.

    One that was saved without its text encoder gets the one that the config beside it names. ValueError says what is wrong.
    """
    run = Run(model)
    if run.config.is_file() and any(run.adapter.glob("*.safetensors")):
        pipe = load(load_file(run.config).model.pretrained)
        pipe.load_lora_weights(run.adapter, use_safetensors=True, local_files_only=True)
        return pipe
    folder = sample.folder(str(model))
    pipe = sample.load(folder)
    if pipe.text_encoder is None and (folder / "config.yaml").is_file():
        tokenizer, encoder = models.text_encoder(load_file(folder / "config.yaml").model.text_encoder)
        pipe.register_modules(tokenizer=tokenizer, text_encoder=encoder)
    return pipe


def load_checkpoint(run: Run, step: int) -> TextToImagePipeline:
    """The pipeline of a run's checkpoint, with the averaged weights; ValueError where the checkpoint is damaged."""
    folder, config = run.checkpoints / str(step), load_file(run.config)
    if damage := runs.verify(folder):
        raise ValueError(f"checkpoint {folder} cannot be used: {damage}")
    base = None if config.model.pretrained is None else load(config.model.pretrained)
    tokenizer, encoder = (base.tokenizer, base.text_encoder) if base else models.text_encoder(config.model.text_encoder)
    if config.train.method == "lora":
        unet, whitening = models.adapt(base.unet, config.lora), base.whitening
    else:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True)
        held = (folder / "whitening").is_dir()
        whitening = CaptionWhitening.from_pretrained(folder / "whitening", use_safetensors=True) if held else None
    average = models.moving_average(unet, config.train.ema)
    average.load_state_dict(runs.load_state(folder, "trainer")["ema"])
    average.copy_to(models.trainable(unet))
    return models.pipeline(config, unet.eval(), tokenizer, encoder, whitening, base)


def commit() -> str:
    """The project's commit, or "unknown" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def hardware() -> str:
    """What this process computes on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"a CPU ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"


def card(config: Config, run: Run, images, seconds: float) -> ModelCard:
    """The model card of a run: how it was made, what it draws, how to load it. All metadata goes through YAML."""
    embedded = config.data.source in emoji.SETS
    data = ModelCardData(
        license="cc-by-4.0" if embedded else "other",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusion", "ddpm", "classifier-free-guidance"],
        widget=[{"text": prompt} for prompt in config.sample.prompts],
    )
    logged = [r for r in run.history() if r.get("loss") is not None]
    last = f"\nLast logged loss: {logged[-1]['loss']:.4f} at step {logged[-1]['step']}.\n" if logged else ""
    pictures = sorted(run.samples.glob("*.png"))
    picture = f"\n![samples](samples/{pictures[-1].name})\n" if pictures else ""
    rows = " · ".join(f"w = {w:g}" for w in config.sample.w)
    shown = ", ".join(f"`{fenced(p)}`" for p in config.sample.prompts)
    loading = f'pipe = TextToImagePipeline.from_pretrained("{run.pipeline}", use_safetensors=True)'
    body = f"""# {fenced(config.name)}

A text-conditional diffusion model trained with Direct Jump.
{picture}
Columns: {shown}. Rows: {rows}.

```python
from pipeline import TextToImagePipeline

{loading}
pipe(["green cat"], w={config.sample.default_w:g}, seed=0).images[0].save("green-cat.png")
```

## Training

- data: {fenced(str(images.report))}
- {config.train.steps} steps of {config.train.batch_size} images, {seconds / 3600:.2f} hours on {hardware()}
- commit {commit()}, seed {config.seed}, caption dropout {config.data.caption_dropout:g}
{last}
```yaml
{config.to_yaml()}```

## Limits

It draws what its small training set shows and composes it only so far. {ATTRIBUTION if embedded else ""}
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def fenced(text: str) -> str:
    """User text that stays text inside Markdown: one line, no HTML, no code fence."""
    return " ".join(text.split()).replace("`", "'").replace("<", "‹").replace(">", "›")


def plot_run(run: Run, images, pipe: TextToImagePipeline) -> Path:
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
            left.plot(*zip(*line, strict=True), marker=".", label=f"{split.replace('_', '-')} grid, averaged weights")
    left.set(xlabel="step", ylabel="loss", yscale="log", title="Loss")
    left.legend()
    if checks:
        grid = [int(t) for t in checks[-1]["train_x_0_error"]]
        for split in ("train", "held_out"):
            if f"{split}_x_0_error" in checks[-1]:
                right.plot(grid, list(checks[-1][f"{split}_x_0_error"].values()), marker=".", label=split.replace("_", "-"))
        rows = torch.linspace(0, len(images) - 1, min(512, len(images))).long()
        x_0 = pipe.encode(images.images[rows].to(pipe.device).float() / 127.5 - 1)
        floor = [irreducible_loss(x_0, pipe.scheduler, t).mean().item() for t in grid]
        right.plot(grid, floor, "k--", label="irreducible without captions (exact denoiser)")
        right.set(xlabel="timestep", ylabel="mean squared error of x_0", yscale="log", title="Error by timestep")
        right.legend()
    path = run.figures / "training.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


@torch.no_grad()
def plot_strips(pipe, prompts: list[str], seen: set[str], path: Path, *, w: float, seed: int, steps: int = 50, eta: float = 1.0,
                columns: int = 8) -> Path:  # fmt: skip
    """The way from noise to picture, a row a prompt: x_t on the left, the current x_0 of (15) on the right.

    Prompts that are not in `seen`, the captions of the data, are labelled so.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = set(torch.linspace(0, steps - 1, columns).round().long().tolist())
    kept = [(step.t, pipe.decode(step.x_t), pipe.decode(step.x_0_hat))
            for i, step in enumerate(pipe.denoise(list(prompts), w=w, seed=seed, num_inference_steps=steps, eta=eta))
            if i in shown]  # fmt: skip
    figure, axes = plt.subplots(len(prompts), 2 * columns + 1, figsize=(2 * columns + 1, 1.25 * len(prompts)),
                                width_ratios=[1] * columns + [0.3] + [1] * columns, squeeze=False)  # fmt: skip
    for row, prompt in enumerate(prompts):
        for column, (t, x_t, x_0_hat) in enumerate(kept):
            for place, x in ((column, x_t), (columns + 1 + column, x_0_hat)):
                axes[row, place].imshow(((x[row] + 1) / 2).clamp(0, 1).permute(1, 2, 0).float().cpu().numpy())
                if row == 0:
                    axes[row, place].set_title(f"t = {int(t)}", fontsize=8)
        note = "" if prompt in seen else "\n(in no training picture)"
        axes[row, 0].text(-0.15, 0.5, prompt + note, ha="right", va="center", transform=axes[row, 0].transAxes, fontsize=10)
    for ax in axes.flat:
        ax.set_axis_off()
    figure.text(0.33, 0.0, "x_t", ha="center")
    figure.text(0.73, 0.0, "x̂_0, the current prediction (15)", ha="center")
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)
    return path
