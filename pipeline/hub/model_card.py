"""What a model is shown with: its card, the pictures on it, its curves."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image

from pipeline.config import Config, load_file
from pipeline.data import dataset
from pipeline.data.emoji import catalogue
from pipeline.diffusion.exact_denoiser import irreducible_loss
from pipeline.diffusion.hub_format import TAGS, loading
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.models import trusted
from pipeline.runs import results as results_module
from pipeline.runs.folder import IMAGES, Run, replace

ATTRIBUTION = "Emoji pictures: Twemoji, (c) Twitter, Inc and other contributors, CC-BY 4.0."
FACTS = "training.json"  # what a run knew at its end that nothing else keeps
HUB_ID = r"\w[\w-]*/\w[\w.-]*"  # what the Hub takes for the name of a model or a data set


def commit() -> str:
    """The project's commit, or "unknown" outside a git checkout and where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def hardware() -> str:
    """What this process computes on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"a CPU ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"


def facts(
    report: str,
    seconds: float,
    *,
    base_model: str | None = None,
    base_model_relation: str = "finetune",
    base_license: str | None = None,
    stock: bool = False,
) -> dict:
    """What a card says of a training that ends now: on which images, for how long, on what machine, from which model.

    report: what the data set said of itself.
    base_model: the Hub's name or the folder of the model that was tuned. base_model_relation: `finetune` or `adapter`.
    base_license: the base model's, as the Hub names licences. stock: whether stock diffusers loads the result, or what an
    adapter adapts, without code.
    """
    found = {
        "images": report,
        "seconds": seconds,
        "hardware": hardware(),
        "commit": commit(),
        "stock": stock,
    }
    base = {
        "base_model": base_model,
        "base_model_relation": base_model_relation,
        "base_license": base_license,
    }
    return found if base_model is None else found | base


def describe(
    config: Config, run: Run, pipe: TextToImagePipeline, images, seconds: float, **base
) -> None:
    """Leave a finished run's card, with the pictures on it and what it is made from; `base` is `facts`' base_model and so on."""
    logged = [record for record in run.history() if record.get("loss") is not None]
    last = {"loss": logged[-1]["loss"], "step": logged[-1]["step"]} if logged else {}
    known = facts(str(images.report), seconds, stock=pipe.is_stable_diffusion(), **base)
    names = {config.data.source, (base.get("base_model") or "").partition("@")[0]}
    known["of_hub"] = [
        name for name in sorted(names) if published(name)
    ]  # a folder of that name may come and go later
    for measured in (
        "metrics.json",
        f"{IMAGES}/free.png",
        f"{IMAGES}/sweep.png",
    ):  # of the model that an earlier end left
        (run.folder / measured).unlink(missing_ok=True)
    replace(run.folder / FACTS, json.dumps(known | last, indent=1))
    illustrate(config, run)
    refresh(run.folder, str(run.adapter if run.adapted else run.pipeline))


def refresh(folder: Path, model: str | None = None, **more) -> None:
    """Write the card of a described run's folder, or of one that keeps its files, anew: with what has been measured since.

    model: where the card says to load it from; None is what it said before. `more` is known from now on.
    """
    path = folder / FACTS
    known = json.loads(path.read_text(encoding="utf-8")) | more
    known["model"] = model or known["model"]
    replace(path, json.dumps(known, indent=1))
    replace(folder / "README.md", str(read(folder, known["model"])))


def illustrate(config: Config, run: Run) -> None:
    """The pictures of a card, `images/`: the newest samples, each prompt's own of those at the default w, and the figures.

    The prompts' own are shown above code that draws at the default w: where the samples have none at it, there are none.
    """
    target, sample = run.folder / IMAGES, config.sample
    target.mkdir(exist_ok=True)
    for old in target.glob("prompt-*.png"):
        old.unlink()
    if drawn := run.drawn():
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


def on_base(config: Config, base: str) -> Config:
    """The settings of an adapter's run by the name that its base has on the Hub."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=base))


def read(folder: Path, model: str, base: str | None = None) -> ModelCard:
    """The card of a described run's folder, or of one that keeps its files: config.yaml, training.json, images/, metrics.json.

    A notes.md there, what somebody has seen by looking, becomes a part of it.

    model: where the card says to load it from, a folder or a repository. base: the Hub's name of the base of an adapter, where
    its settings name a folder.
    """
    metrics, notes = folder / "metrics.json", folder / "notes.md"
    config, known = load_file(folder / "config.yaml"), trusted.read(folder / FACTS)
    if base is not None:
        config = on_base(config, base)
        known |= {"base_model": base, "of_hub": [*known.get("of_hub", []), base.partition("@")[0]]}
    return build(
        config,
        known,
        sorted(path.name for path in (folder / IMAGES).glob("*.png")),
        model,
        trusted.read(metrics) if metrics.is_file() else {},
        notes.read_text(encoding="utf-8").strip() if notes.is_file() else "",
    )


def build(
    config: Config,
    known: dict,
    pictures: list[str] = (),
    model: str = "USER/NAME",
    metrics: dict | None = None,
    notes: str = "",
) -> ModelCard:
    """The model card: what it draws, how to load it, how it was made, what was measured, its limits and its licences.

    known: of `facts`. pictures: the names of those in images/. metrics: of `pipeline.evaluation`. notes: Markdown. All
    metadata goes through YAML, and what users wrote is quoted in the body, so that it stays text.
    """
    embedded, sample, base = (
        config.data.source in catalogue.SETS,
        config.sample,
        known.get("base_model"),
    )
    adapter = known.get("base_model_relation") == "adapter"
    base_name, licence = (base or "").partition("@")[0], known.get("base_license")
    on_hub = known["of_hub"].__contains__ if "of_hub" in known else published
    of_hub = [name for name in (config.data.source, base_name) if on_hub(name)]
    shown = [i for i in range(len(sample.prompts)) if f"prompt-{i}.png" in pictures]
    data = ModelCardData(
        license=("other" if "," in licence else licence)
        if licence
        else "cc-by-4.0"
        if embedded and not base
        else "other",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=TAGS,
        datasets=[config.data.source] if config.data.source in of_hub else None,
        base_model=base_name if base_name in of_hub else None,
        base_model_relation=known["base_model_relation"] if base_name in of_hub else None,
        widget=[
            {"text": sample.prompts[i], "output": {"url": f"{IMAGES}/prompt-{i}.png"}}
            for i in shown
        ]
        or None,
        model_name=config.name,
        eval_results=results(config, metrics or {}) or None,
    )
    sections = [
        f"# {fenced(config.name)}\n\nA text-conditional diffusion model, trained with Direct Jump"
        + (f" from `{fenced(base)}`." if base else "."),
        "<Gallery />" if shown else "",
        picture(
            "samples.png",
            pictures,
            f"Columns: {', '.join(f'`{fenced(p)}`' for p in sample.prompts)}. Rows: "
            f"{' · '.join(f'w = {w:g}' for w in sample.w)}, the same noise.",
        ),
        "## Use\n\nIt needs diffusers 0.42 and transformers 5.3, or newer.\n\n"
        + (
            adapting(base, model, sample.prompts[0], sample.default_w, known["stock"])
            if adapter
            else shipping(model, sample.prompts[0], sample.default_w)
            if known.get("shipped") and model == known["model"]
            else loading(model, known["stock"], sample.prompts[0], sample.default_w)
        ),
        "## Training\n\n" + training(config, known),
        picture("training.png", pictures, "The loss, and the error by timestep."),
        picture(
            "strips.png",
            pictures,
            "From noise to picture: x_t on the left, the current x_0 on the right.",
        ),
        picture(
            "free.png",
            pictures,
            "Prompts that name no picture of any embedded set, the first seed.",
        ),
        "## Measured\n\n"
        + (block(measured(metrics)) if metrics else "Nothing yet, beyond the losses."),
        picture(
            "sweep.png",
            pictures,
            "Quality against alignment, one knob changed at a time from the star.",
        ),
        notes,
        "## Limits\n\nIt draws what its training pictures show, composes that only so far, and has their bias. There is no "
        "safety checker: look at what it draws before others do.",
        "## Licence\n\n" + licences(embedded, base, known.get("base_license")),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def license_of(model: str) -> str | None:
    """The licence that a model's own card names, where the card lies in a folder here; None where it is not known.

    A card that cannot be read names none: somebody else's mistake in it shall not end a training.
    """
    path = Path(model) / "README.md"
    if not path.is_file():
        return None
    try:
        found = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict().get("license")
    except (ValueError, yaml.YAMLError):
        return None
    return (
        ", ".join(map(str, found))
        if isinstance(found, list)
        else None
        if found is None
        else str(found)
    )


def adapting(base: str, adapter: str, prompt: str, w: float, stock: bool) -> str:
    """How to draw with an adapter on the model that it adapts, as Markdown; stock: whether stock diffusers loads that one."""
    if stock:
        name, revision = trusted.named(base) or (base, None)
        at = "" if revision is None else f", revision={revision!r}"
        return f"""```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({name!r}{at}, use_safetensors=True)
pipe.load_lora_weights({adapter!r}, use_safetensors=True)
picture = pipe({prompt!r}, guidance_scale={1 + w:g}).images[0]
```"""
    return f"""```python
from pipeline import hub

pipe = hub.load({base!r})
pipe.load_lora_weights({adapter!r}, use_safetensors=True)
picture = pipe({prompt!r}, w={w:g}, seed=0).images[0]
```

`pipeline` is Direct Jump. Without it, load the base as its own card says, then go on as above."""


def shipping(model: str, prompt: str, w: float) -> str:
    """How to draw with a model that a repository of this project keeps without its text encoder, as Markdown."""
    return f"""```python
from pipeline import hub

pipe = hub.load({model!r})  # brings the text encoder that config.yaml names, from its pip package
picture = pipe({prompt!r}, w={w:g}, seed=0).images[0]
```"""


def published(name: str) -> bool:
    """Whether this names something on the Hub, and not a folder here."""
    return re.fullmatch(HUB_ID, name) is not None and not Path(name).exists()


def picture(name: str, pictures: list[str], caption: str) -> str:
    """A picture with what it shows, nothing where it is not there."""
    return (
        f"![{name.removesuffix('.png')}]({IMAGES}/{name})\n\n{caption}" if name in pictures else ""
    )


def training(config: Config, known: dict) -> str:
    """How the model was made, as Markdown."""
    loss = (
        f"\n- last logged loss: {known['loss']:.4f} at step {known['step']}"
        if "loss" in known
        else ""
    )
    return f"""{block(known["images"])}

- {config.train.steps} steps of {config.train.batch_size} images, {known["seconds"] / 3600:.2f} hours on {known["hardware"]}
- commit {known["commit"]}, seed {config.seed}, caption dropout {config.data.caption_dropout:g}{loss}

{block(config.to_yaml(), "yaml")}"""


def licences(embedded: bool, base: str | None, base_license: str | None) -> str:
    """Under what terms each part is to be had."""
    told = [
        "The code that travels with the model, `pipeline.py` and the files that it names, is Direct Jump's: Apache-2.0."
    ]
    if base:
        told += [
            f"The weights come from `{fenced(base)}`, and its licence holds for them: "
            f"{f'`{fenced(base_license)}`' if base_license else 'see there'}."
        ]
    told += [
        ATTRIBUTION if embedded else "The training data has its own licence, which its owner tells."
    ]
    return " ".join(told)


def results(config: Config, metrics: dict) -> list[EvalResult]:
    """The shares that `pipeline.evaluation` measured, for the Hub's index of models: means over the seeds drawn with."""
    found = []
    for split in ("train", "held_out"):
        for name, words in (
            ("first", "own picture first"),
            ("first_five", "own picture among the first five"),
        ):
            shares = [
                seed[split][name]["share"]
                for seed in metrics.get("by_seed", {}).values()
                if name in seed.get(split, {})
            ]
            if shares:
                found.append(
                    EvalResult(
                        task_type="text-to-image",
                        dataset_type=config.data.source,
                        dataset_name=config.data.source,
                        dataset_split=split,
                        metric_type="retrieval",
                        metric_name=f"{words}, {split.replace('_', '-')} captions, w = {metrics['w']:g}",
                        metric_value=round(sum(shares) / len(shares), 4),
                    )
                )
    return found


def measured(metrics: dict) -> str:
    """What was measured, in words where `pipeline.evaluation` did."""
    ours = {"by_seed", "sweep"} & metrics.keys()
    return (
        results_module.report(metrics)
        if ours
        else json.dumps(metrics, indent=1, ensure_ascii=False)
    )


def fenced(text: str) -> str:
    """User text that stays text between backticks: one line, no HTML, no backtick of its own."""
    return " ".join(text.split()).replace("`", "'").replace("<", "‹").replace(">", "›")


def block(text: str, language: str = "text") -> str:
    """Text of any kind as a code block that nothing in it can end."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


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
        rows = dataset.evenly(512, len(images))
        x_0 = pipe.encode(
            dataset.as_float(images.images[rows].to(pipe.device))
        ).cpu()  # MPS has no float64
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
