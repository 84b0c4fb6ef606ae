"""Copy models into plain folders: from a run for a git repository, or from the Hub."""

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.config import AutoencoderConfig, DataConfig, load_file
from pipeline.hub.autoencoder_card import refresh_autoencoder_card
from pipeline.hub.client import HubError, disk_errors
from pipeline.hub.model_card import (
    TRAINING_FACTS,
    public_name,
    public_report,
    read_settings,
    refresh_card,
    without_local_paths,
)
from pipeline.hub.push import require_finished
from pipeline.models import trusted
from pipeline.models.build import is_learned_autoencoder, load_autoencoder
from pipeline.models.loading import load_pipeline
from pipeline.runs.folder import IMAGES_FOLDER, MODEL_INDEX, RunFolder

SHARD_SIZE = 9_400_000  # bytes of weights in one file of an export


def export(source: str | Path, folder: Path) -> Path:
    """Save a run's model for a git repository: bf16 weights in shards, no code, no text encoder.

    `load_pipeline` adds the text encoder that config.yaml names. `push` adds it and the code.
    """
    require_new_folder(folder)
    run = RunFolder(source)
    if run.autoencoder.is_dir():
        return export_autoencoder(run, folder)
    if not (run.config.is_file() and (run.pipeline / MODEL_INDEX).is_file()):
        raise HubError(f"{source} is not a finished run. Finish its training first.")
    require_finished(run)
    pipe = load_pipeline(source)
    pipe.unet.to(torch.bfloat16)
    if is_learned_autoencoder(pipe.vae):
        pipe.vae.to(torch.bfloat16)
    pipe.register_modules(text_encoder=None, tokenizer=None)
    with atomic_folder(folder) as new:
        pipe.save_pretrained(new, safe_serialization=True, max_shard_size=SHARD_SIZE)
        for code in new.rglob("*.py"):
            code.unlink()
        local, facts = read_settings(run.folder)
        config, facts = without_local_paths(local, facts)
        # The export is loaded with its encoder.
        model = dataclasses.replace(config.model, text_encoder=local.model.text_encoder)
        config = dataclasses.replace(config, model=model)
        (new / run.config.name).write_text(config.to_yaml(), encoding="utf-8")
        (new / TRAINING_FACTS).write_text(json.dumps(facts), encoding="utf-8")
        shutil.copytree(run.folder / IMAGES_FOLDER, new / IMAGES_FOLDER)
        refresh_card(new, str(folder), shipped=True)
    return folder


def export_autoencoder(run: RunFolder, folder: Path) -> Path:
    """Save a run's autoencoder in half precision, with its card, settings and figure."""
    require_finished(run)
    config = load_file(run.config, AutoencoderConfig)
    vae: Any = load_autoencoder(str(run.folder))
    with atomic_folder(folder) as new:
        vae.half().save_pretrained(new, safe_serialization=True, max_shard_size=SHARD_SIZE)
        facts = json.loads((run.folder / TRAINING_FACTS).read_text(encoding="utf-8"))
        facts["images"] = public_report(facts["images"], config.data)
        (new / TRAINING_FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        source = public_name(config.data.source)
        data = dataclasses.replace(config.data, source=source, cache=DataConfig.cache)
        config = dataclasses.replace(config, output=AutoencoderConfig.output, data=data)
        (new / run.config.name).write_text(config.to_yaml(), encoding="utf-8")
        shutil.copytree(run.folder / IMAGES_FOLDER, new / IMAGES_FOLDER)
        refresh_autoencoder_card(new, config, str(folder))
    return folder


def pull(model: str, folder: Path) -> Path:
    """Copy a model on the Hub into a new folder, without code and pickles."""
    require_new_folder(folder)
    source = trusted.download_model(model)
    with atomic_folder(folder) as new:
        for path in trusted.downloaded_files(source):
            target = new / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    return folder


def require_new_folder(folder: Path) -> None:
    """Raise HubError if the name of a new folder is taken."""
    if folder.exists():
        raise HubError(f"{folder} exists. Choose the name of a new folder.")


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, which gets its name when it is complete; HubError if that fails."""
    with disk_errors(f"writing {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            new = Path(scratch) / folder.name
            new.mkdir()
            yield new
            new.rename(folder)
