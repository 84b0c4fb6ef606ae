"""Write the card of a model: how to load it, how it was made, what was measured, its licences."""

import dataclasses
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pipeline.config import Config, DataConfig, load_file
from pipeline.data.dataset import CaptionedImages
from pipeline.data.emoji.embedded import EMBEDDED_SETS, attribution_of
from pipeline.diffusion.hub_format import MODEL_TAGS, usage_snippet
from pipeline.diffusion.text_to_image import TextToImagePipeline
from pipeline.hub.figures import collect_images
from pipeline.models.trusted import is_repo_id, parse_repo_id, read_json
from pipeline.runs.files import replace_text
from pipeline.runs.folder import IMAGES_FOLDER, RunFolder
from pipeline.runs.results import Metrics

TEMPLATE = Path(__file__).with_name("model_card_template.md")
TRAINING_FACTS = "training.json"  # what only the end of a training knows
LOCAL_NAME = "local-folder"  # in the place of a path of this machine


def git_commit() -> str:
    """Return the short commit of the checkout; "unknown" without a checkout or without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def hardware_name() -> str:
    """Return the name of the GPU, or the number of threads and instruction set of the CPU."""
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
    steps: int | None = None,
    best_step: int | None = None,
) -> dict:
    """Return what a card says about a training that ends now.

    report: of the dataset. base_model: the Hub name or folder of the model that was fine-tuned.
    base_model_relation: `finetune` or `adapter`. base_license: as the Hub names licences.
    stock: whether stock diffusers loads the model, or an adapter's base model, without code.
    steps: taken, fewer than train.steps under train.patience. best_step: of train.keep_best.
    """
    facts = {
        "images": report,
        "seconds": seconds,
        "hardware": hardware_name(),
        "commit": git_commit(),
        "stock": stock,
        "steps": steps,
        "best_step": best_step,
    }
    if base_model is not None:
        facts["base_model"] = base_model
        facts["base_model_relation"] = base_model_relation
        facts["base_license"] = base_license
    return facts


def write_card(
    config: Config,
    run: RunFolder,
    pipe: TextToImagePipeline,
    images: CaptionedImages,
    seconds: float,
    **base: Any,
) -> None:
    """Write the card of a finished run, its images and its training.json.

    base: steps, best_step and what is said about a base model, as in `training_facts`.
    """
    facts = training_facts(str(images.report), seconds, stock=pipe.is_stable_diffusion(), **base)
    # A folder with the name of a repository may come and go later, so note now what is on the Hub.
    names = (*config.data.sources, base.get("base_model") or "", config.model.text_encoder)
    repositories = {name.partition("@")[0] for name in names}
    facts["of_hub"] = sorted(name for name in repositories if is_hub_id(name))
    logged = [record for record in run.history() if record.get("loss") is not None]
    if logged:
        facts |= {"loss": logged[-1]["loss"], "step": logged[-1]["step"]}
    # These were measured on the model of an earlier end of this run.
    for outdated in ("metrics.json", f"{IMAGES_FOLDER}/free.png", f"{IMAGES_FOLDER}/sweep.png"):
        (run.folder / outdated).unlink(missing_ok=True)
    replace_text(run.folder / TRAINING_FACTS, json.dumps(facts, indent=1))
    collect_images(config, run)
    refresh_card(run.folder, str(run.adapter if run.has_adapter else run.pipeline))


def refresh_card(folder: Path, model: str | None = None, **more: object) -> None:
    """Write the card of a folder with a training.json again, with what was measured since.

    model: where the card loads the model from; None keeps it. more: facts to add.
    """
    path = folder / TRAINING_FACTS
    facts = json.loads(path.read_text(encoding="utf-8")) | more
    facts["model"] = model or facts["model"]
    replace_text(path, json.dumps(facts, indent=1))
    replace_text(folder / "README.md", str(read_card(folder, facts["model"])))


def read_settings(folder: Path, base: str | None = None) -> tuple[Config, dict]:
    """Return the settings in a folder's config.yaml and, if there is one, its training.json.

    base: the name on the Hub of an adapter's base model, if its settings name a folder.
    """
    config = load_file(folder / "config.yaml")
    path = folder / TRAINING_FACTS
    facts = read_json(path) if path.is_file() else {}
    if base is not None:
        model = dataclasses.replace(config.model, pretrained=base)
        config = dataclasses.replace(config, model=model)
        hub_names = [*facts.get("of_hub", []), base.partition("@")[0]]
        facts |= {"base_model": base, "of_hub": hub_names}
    return config, facts


def public_name(name: str, of_hub: list[str] | None = None) -> str:
    """Return the name of something embedded or on the Hub; LOCAL_NAME for a path of this machine.

    of_hub: the names that were on the Hub when a run ended; None if that was not recorded.
    """
    is_public = name in (*EMBEDDED_SETS, "minilm") or is_hub_id(name.partition("@")[0], of_hub)
    return name if is_public else LOCAL_NAME


def public_report(report: str, data: DataConfig, of_hub: list[str] | None = None) -> str:
    """Return a dataset report without paths of this machine and without skipped files."""
    lines = [line for line in report.splitlines() if not line.startswith("  skipped ")]
    report = "\n".join(lines)
    names = {name: public_name(name, of_hub) for name in data.sources}
    names[data.cache] = DataConfig.cache
    for name, known in names.items():
        if name == known or name == ".":
            continue
        for path in (str(Path(name).absolute()), name, str(Path(name))):
            report = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w.-])", LOCAL_NAME, report)
    return report


def without_local_paths(config: Config, facts: dict) -> tuple[Config, dict]:
    """Return settings and facts that do not tell where anything lay on this machine.

    Names of included datasets and models and of repositories on the Hub stay. The dataset report
    loses the names of skipped files.
    """
    data = config.data
    model = config.model

    def public(name: str) -> str:
        return public_name(name, facts.get("of_hub"))

    facts = facts | {"images": public_report(facts.get("images", ""), data, facts.get("of_hub"))}
    if facts.get("base_model"):
        facts["base_model"] = public(facts["base_model"])
    keep = data.keep and dataclasses.replace(data.keep, source=public(data.keep.source))
    data = dataclasses.replace(data, source=public(data.source), keep=keep, cache=DataConfig.cache)
    model = dataclasses.replace(
        model,
        pretrained=model.pretrained and public(model.pretrained),
        text_encoder=public(model.text_encoder),
        autoencoder=model.autoencoder and public(model.autoencoder),
    )
    return dataclasses.replace(config, output=Config.output, data=data, model=model), facts


def read_card(folder: Path, model: str, settings: tuple[Config, dict] | None = None) -> ModelCard:
    """Build the card of a folder from its config.yaml, training.json, images/ and metrics.json.

    Its notes.md, if there is one, becomes a part of the card.
    model: the folder or repository that the card loads the model from.
    settings: in the place of `read_settings(folder)`.
    """
    config, facts = settings or read_settings(folder)
    images = sorted(path.name for path in (folder / IMAGES_FOLDER).glob("*.png"))
    metrics = folder / "metrics.json"
    notes = folder / "notes.md"
    return build_card(
        config,
        facts,
        images,
        model,
        read_json(metrics) if metrics.is_file() else {},
        notes.read_text(encoding="utf-8").strip() if notes.is_file() else "",
    )


def build_card(
    config: Config,
    facts: dict,
    images: list[str] | tuple[str, ...] = (),
    model: str = "USER/NAME",
    metrics: dict | None = None,
    notes: str = "",
) -> ModelCard:
    """Build a model card from its template.

    facts: of `training_facts`. images: the names of the files in images/. model: where the card
    loads it from. metrics: of the evaluation. notes: Markdown.
    The metadata goes through YAML, and text from users is quoted in the body, so it stays text.
    """
    base = facts.get("base_model")
    base_name = (base or "").partition("@")[0]
    attribution = "\n\n".join(filter(None, dict.fromkeys(map(attribution_of, config.data.sources))))
    hub_names = facts.get("of_hub")
    has_base = is_hub_id(base_name, hub_names)
    is_adapter = facts.get("base_model_relation") == "adapter"
    gallery = [
        {"text": prompt, "output": {"url": f"{IMAGES_FOLDER}/prompt-{i}.png"}}
        for i, prompt in enumerate(config.sample.prompts)
        if f"prompt-{i}.png" in images
    ]
    data = ModelCardData(
        license=card_license(bool(attribution), base, facts.get("base_license")),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*MODEL_TAGS, "lora"] if is_adapter else MODEL_TAGS,
        datasets=[name for name in config.data.sources if is_hub_id(name, hub_names)] or None,
        base_model=base_name if has_base else None,
        base_model_relation=facts["base_model_relation"] if has_base else None,
        widget=gallery or None,
        model_name=config.name,
        eval_results=eval_results(config, metrics or {}) or None,
    )
    is_shipped = facts.get("shipped") and model == facts["model"]
    prompt = config.sample.prompts[0]
    w = config.sample.default_w
    repo_id, revision = parse_repo_id(base or "") or (base, None)
    return ModelCard.from_template(
        data,
        str(TEMPLATE),
        config=config,
        facts=facts,
        model=model,
        base=base,
        base_repo_id=repo_id,
        base_revision=revision,
        is_adapter=is_adapter,
        is_shipped=is_shipped,
        usage="" if is_adapter or is_shipped else usage_snippet(model, facts["stock"], prompt, w),
        gallery=gallery,
        images=images,
        folder=IMAGES_FOLDER,
        results=metrics_section(metrics) if metrics else "",
        notes=notes,
        attribution=attribution,
        inline_code=inline_code,
        code_block=code_block,
        repr=repr,
    )


def card_license(embedded: bool, base: str | None, base_license: str | None) -> str:
    """Return the licence in the metadata: the base model's, else that of an embedded dataset."""
    if base_license:
        return "other" if "," in base_license else base_license
    return "cc-by-4.0" if embedded and not base else "other"


def license_of(model: str) -> str | None:
    """Return the licence in the card of a model in a folder; None if it is unknown.

    None for an unreadable card: a malformed third-party card must not abort training.
    """
    path = Path(model) / "README.md"
    if not path.is_file():
        return None
    try:
        found = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict().get("license")
    except (ValueError, yaml.YAMLError):
        return None
    if isinstance(found, list):
        return ", ".join(map(str, found))
    return None if found is None else str(found)


def is_hub_id(name: str, noted: list[str] | None = None) -> bool:
    """Return whether this names something on the Hub and nothing on this disk.

    noted: the names that were on the Hub when the run ended; None if that was not recorded.
    """
    if noted is not None:
        return name in noted
    return is_repo_id(name) and not Path(name).exists()


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
    """Return user text that stays text between backticks: one line, no HTML, no backtick."""
    return " ".join(text.split()).replace("`", "'").replace("<", "‹").replace(">", "›")


def code_block(text: str, language: str = "text") -> str:
    """Return text as a code block that nothing in the text can end."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
