"""Find a model by its name: a run, a saved pipeline, or a repository on the Hub.

This module imports neither torch nor diffusers, so a mistyped path is reported at once.
"""

from pathlib import Path

from pipeline.models import trusted
from pipeline.runs.folder import ADAPTER_FILE, MODEL_INDEX, RunFolder

PINNED_MODEL_FILE = "model.txt"  # the model of a Space, as USER/NAME@COMMIT
SHIPPED_MODEL = "pretrained/emoji"


def resolve_model_folder(model: str | Path) -> Path:
    """Return the folder of a saved pipeline or adapter.

    model: that folder, the folder of its run, or `USER/NAME[@REVISION]` on the Hub.
    """
    path = Path(model)
    places = (
        (path, MODEL_INDEX),
        (path / "pipeline", MODEL_INDEX),
        (path, ADAPTER_FILE),
        (path / "lora", ADAPTER_FILE),
    )
    for folder, file in places:
        if (folder / file).is_file():
            return folder
    if path.is_dir():
        if (path / "config.yaml").is_file():
            fix = "Its training has not finished: run the training command again."
        else:
            fix = "Pass the folder of a run or of a saved pipeline."
        raise ValueError(f"{model} has no pipeline/{MODEL_INDEX}. {fix}")
    if path.is_file():
        convert = f"StableDiffusionPipeline.from_single_file({str(model)!r})"
        raise ValueError(
            f"{model} is a file, not the folder of a saved pipeline. Convert a checkpoint with "
            f"diffusers.{convert}.save_pretrained(FOLDER)."
        )
    return trusted.download_model(str(model))


def default_model(
    root: str | Path = "runs",
    shipped: str | Path = SHIPPED_MODEL,
    pinned: str | Path = PINNED_MODEL_FILE,
    finished: bool = False,
) -> Path | str | None:
    """Return the model to use if the user names none, or None if there is none.

    It is the one that a Space is pinned to, else the run that was written to last, else the
    shipped model. finished: take only finished runs; otherwise a checkpoint is enough.
    """
    if Path(pinned).is_file():
        return Path(pinned).read_text(encoding="utf-8").strip()
    runs = [RunFolder(folder) for folder in Path(root).glob("*")]
    if finished:
        usable = [run for run in runs if run.finished]
    else:
        usable = [run for run in runs if run.has_model or run.steps()]
    if usable:
        return max(usable, key=_last_write).folder
    return Path(shipped) if (Path(shipped) / MODEL_INDEX).is_file() else None


def _last_write(run: RunFolder) -> float:
    """Return when a run was last logged to, in seconds since the epoch; 0 for never."""
    return run.metrics.stat().st_mtime if run.metrics.exists() else 0
