"""What a model is shown with: its card, the pictures on it, its curves."""

import dataclasses
import json
import re
import subprocess
from pathlib import Path

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pipeline.config import Config, load_file
from pipeline.data.emoji.catalogue import SETS
from pipeline.diffusion.hub_format import MODEL_TAGS, usage_snippet
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.hub.figures import collect_images
from pipeline.models.trusted import parse_repo_id, read_json
from pipeline.runs.files import replace_text
from pipeline.runs.folder import IMAGES_FOLDER, RunFolder
from pipeline.runs.results import Metrics

ATTRIBUTION = "Emoji pictures: Twemoji, (c) Twitter, Inc and other contributors, CC-BY 4.0."
TRAINING_FACTS = "training.json"  # what a run knew at its end that nothing else keeps
HUB_ID = r"\w[\w-]*/\w[\w.-]*"  # what the Hub takes for the name of a model or a data set


def git_commit() -> str:
    """The project's commit, or "unknown" outside a git checkout and where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def hardware_name() -> str:
    """What this process computes on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"a CPU ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"


def training_facts(
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
        "hardware": hardware_name(),
        "commit": git_commit(),
        "stock": stock,
    }
    base = {
        "base_model": base_model,
        "base_model_relation": base_model_relation,
        "base_license": base_license,
    }
    return found if base_model is None else found | base


def write_card(
    config: Config, run: RunFolder, pipe: TextToImagePipeline, images, seconds: float, **base
) -> None:
    """Leave a finished run's card, with the pictures on it and what it is made from; `base` is `facts`' base_model and so on."""
    logged = [record for record in run.history() if record.get("loss") is not None]
    last = {"loss": logged[-1]["loss"], "step": logged[-1]["step"]} if logged else {}
    known = training_facts(str(images.report), seconds, stock=pipe.is_stable_diffusion(), **base)
    names = {config.data.source, (base.get("base_model") or "").partition("@")[0]}
    known["of_hub"] = [
        name for name in sorted(names) if is_hub_id(name)
    ]  # a folder of that name may come and go later
    for measured in (
        "metrics.json",
        f"{IMAGES_FOLDER}/free.png",
        f"{IMAGES_FOLDER}/sweep.png",
    ):  # of the model that an earlier end left
        (run.folder / measured).unlink(missing_ok=True)
    replace_text(run.folder / TRAINING_FACTS, json.dumps(known | last, indent=1))
    collect_images(config, run)
    refresh_card(run.folder, str(run.adapter if run.has_adapter else run.pipeline))


def refresh_card(folder: Path, model: str | None = None, **more) -> None:
    """Write the card of a described run's folder, or of one that keeps its files, anew: with what has been measured since.

    model: where the card says to load it from; None is what it said before. `more` is known from now on.
    """
    path = folder / TRAINING_FACTS
    known = json.loads(path.read_text(encoding="utf-8")) | more
    known["model"] = model or known["model"]
    replace_text(path, json.dumps(known, indent=1))
    replace_text(folder / "README.md", str(read_card(folder, known["model"])))


def with_base(config: Config, base: str) -> Config:
    """The settings of an adapter's run by the name that its base has on the Hub."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=base))


def read_card(folder: Path, model: str, base: str | None = None) -> ModelCard:
    """The card of a described run's folder, or of one that keeps its files: config.yaml, training.json, images/, metrics.json.

    A notes.md there, what somebody has seen by looking, becomes a part of it.

    model: where the card says to load it from, a folder or a repository. base: the Hub's name of the base of an adapter, where
    its settings name a folder.
    """
    metrics, notes = folder / "metrics.json", folder / "notes.md"
    config, known = load_file(folder / "config.yaml"), read_json(folder / TRAINING_FACTS)
    if base is not None:
        config = with_base(config, base)
        known |= {"base_model": base, "of_hub": [*known.get("of_hub", []), base.partition("@")[0]]}
    return build_card(
        config,
        known,
        sorted(path.name for path in (folder / IMAGES_FOLDER).glob("*.png")),
        model,
        read_json(metrics) if metrics.is_file() else {},
        notes.read_text(encoding="utf-8").strip() if notes.is_file() else "",
    )


def build_card(
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
        config.data.source in SETS,
        config.sample,
        known.get("base_model"),
    )
    adapter = known.get("base_model_relation") == "adapter"
    base_name, licence = (base or "").partition("@")[0], known.get("base_license")
    on_hub = known["of_hub"].__contains__ if "of_hub" in known else is_hub_id
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
        tags=MODEL_TAGS,
        datasets=[config.data.source] if config.data.source in of_hub else None,
        base_model=base_name if base_name in of_hub else None,
        base_model_relation=known["base_model_relation"] if base_name in of_hub else None,
        widget=[
            {"text": sample.prompts[i], "output": {"url": f"{IMAGES_FOLDER}/prompt-{i}.png"}}
            for i in shown
        ]
        or None,
        model_name=config.name,
        eval_results=eval_results(config, metrics or {}) or None,
    )
    sections = [
        f"# {inline_code(config.name)}\n\nA text-conditional diffusion model, trained with Direct Jump"
        + (f" from `{inline_code(base)}`." if base else "."),
        "<Gallery />" if shown else "",
        image_section(
            "samples.png",
            pictures,
            f"Columns: {', '.join(f'`{inline_code(p)}`' for p in sample.prompts)}. Rows: "
            f"{' · '.join(f'w = {w:g}' for w in sample.w)}, the same noise.",
        ),
        "## Use\n\nIt needs diffusers 0.42 and transformers 5.3, or newer.\n\n"
        + (
            adapter_usage(base, model, sample.prompts[0], sample.default_w, known["stock"])
            if adapter
            else local_usage(model, sample.prompts[0], sample.default_w)
            if known.get("shipped") and model == known["model"]
            else usage_snippet(model, known["stock"], sample.prompts[0], sample.default_w)
        ),
        "## Training\n\n" + training_section(config, known),
        image_section("training.png", pictures, "The loss, and the error by timestep."),
        image_section(
            "strips.png",
            pictures,
            "From noise to picture: x_t on the left, the current x_0 on the right.",
        ),
        image_section(
            "free.png",
            pictures,
            "Prompts that name no picture of any embedded set, the first seed.",
        ),
        "## Measured\n\n"
        + (code_block(metrics_section(metrics)) if metrics else "Nothing yet, beyond the losses."),
        image_section(
            "sweep.png",
            pictures,
            "Quality against alignment, one knob changed at a time from the star.",
        ),
        notes,
        "## Limits\n\nIt draws what its training pictures show, composes that only so far, and has their bias. There is no "
        "safety checker: look at what it draws before others do.",
        "## Licence\n\n" + licence_section(embedded, base, known.get("base_license")),
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


def adapter_usage(base: str, adapter: str, prompt: str, w: float, stock: bool) -> str:
    """How to draw with an adapter on the model that it adapts, as Markdown; stock: whether stock diffusers loads that one."""
    if stock:
        name, revision = parse_repo_id(base) or (base, None)
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


def local_usage(model: str, prompt: str, w: float) -> str:
    """How to draw with a model that a repository of this project keeps without its text encoder, as Markdown."""
    return f"""```python
from pipeline import hub

pipe = hub.load({model!r})  # brings the text encoder that config.yaml names, from its pip package
picture = pipe({prompt!r}, w={w:g}, seed=0).images[0]
```"""


def is_hub_id(name: str) -> bool:
    """Whether this names something on the Hub, and not a folder here."""
    return re.fullmatch(HUB_ID, name) is not None and not Path(name).exists()


def image_section(name: str, pictures: list[str], caption: str) -> str:
    """A picture with what it shows, nothing where it is not there."""
    return (
        f"![{name.removesuffix('.png')}]({IMAGES_FOLDER}/{name})\n\n{caption}"
        if name in pictures
        else ""
    )


def training_section(config: Config, known: dict) -> str:
    """How the model was made, as Markdown."""
    loss = (
        f"\n- last logged loss: {known['loss']:.4f} at step {known['step']}"
        if "loss" in known
        else ""
    )
    return f"""{code_block(known["images"])}

- {config.train.steps} steps of {config.train.batch_size} images, {known["seconds"] / 3600:.2f} hours on {known["hardware"]}
- commit {known["commit"]}, seed {config.seed}, caption dropout {config.data.caption_dropout:g}{loss}

{code_block(config.to_yaml(), "yaml")}"""


def licence_section(embedded: bool, base: str | None, base_license: str | None) -> str:
    """Under what terms each part is to be had."""
    told = [
        "The code that travels with the model, `pipeline.py` and the files that it names, is Direct Jump's: Apache-2.0."
    ]
    if base:
        told += [
            f"The weights come from `{inline_code(base)}`, and its licence holds for them: "
            f"{f'`{inline_code(base_license)}`' if base_license else 'see there'}."
        ]
    told += [
        ATTRIBUTION if embedded else "The training data has its own licence, which its owner tells."
    ]
    return " ".join(told)


def eval_results(config: Config, metrics: dict) -> list[EvalResult]:
    """Return recall@1 and recall@5 of both splits for the Hub's model index, means over seeds."""
    if "by_seed" not in metrics:
        return []
    measured = Metrics.from_json(metrics)
    found = []
    for split in ("train", "held_out"):
        for at in (1, 5):
            recall = measured.mean_recall(split, at)
            if recall is not None:
                words = f"{split.replace('_', '-')} captions, w = {measured.w:g}"
                result = EvalResult(
                    task_type="text-to-image",
                    dataset_type=config.data.source,
                    dataset_name=config.data.source,
                    dataset_split=split,
                    metric_type="retrieval",
                    metric_name=f"recall@{at}, {words}",
                    metric_value=round(recall, 4),
                )
                found.append(result)
    return found


def metrics_section(metrics: dict) -> str:
    """Return what was measured as text; the JSON itself where it has another shape."""
    if {"by_seed", "sweep"} & metrics.keys():
        return str(Metrics.from_json(metrics))
    return json.dumps(metrics, indent=1, ensure_ascii=False)


def inline_code(text: str) -> str:
    """User text that stays text between backticks: one line, no HTML, no backtick of its own."""
    return " ".join(text.split()).replace("`", "'").replace("<", "‹").replace(">", "›")


def code_block(text: str, language: str = "text") -> str:
    """Text of any kind as a code block that nothing in it can end."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
