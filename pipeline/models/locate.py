"""Find a model by its name: a run, a saved pipeline, or a repository on the Hub.

This module imports neither torch nor diffusers, so a mistyped path is reported at once.
"""

from pathlib import Path

from pipeline.models import trusted
from pipeline.models.trusted import parse_repo_id
from pipeline.runs.folder import ADAPTER_FILE, MODEL_INDEX, RunFolder

PINNED_MODEL_FILE = "model.txt"  # a Space's model, USER/NAME@COMMIT


def resolve_model_folder(model: str | Path) -> Path:
    """The folder of a saved pipeline, from its own path, from that of its run, or from the Hub."""
    model = str(model)
    whole = [(Path(model), MODEL_INDEX), (Path(model) / "pipeline", MODEL_INDEX)]
    for path, file in (*whole, (Path(model), ADAPTER_FILE), (Path(model) / "lora", ADAPTER_FILE)):
        if (path / file).is_file():
            return path
    if Path(model).is_dir():
        held = (
            "its training has not finished: run the training command again"
            if (Path(model) / "config.yaml").is_file()
            else ("pass a run's folder or a saved pipeline's")
        )
        raise ValueError(
            f"{model} holds no pipeline, expected {Path(model) / 'pipeline' / MODEL_INDEX}: {held}"
        )
    if Path(model).is_file():
        raise ValueError(
            f"{model} is a file, expected the folder of a saved pipeline: make one of a checkpoint by diffusers' "
            f"StableDiffusionPipeline.from_single_file({model!r}).save_pretrained(FOLDER)"
        )
    if parse_repo_id(model):
        return trusted.download_model(model)
    raise ValueError(
        f"{model} does not exist, expected the folder of a run or of a saved pipeline, or a model of the Hub "
        "(user/name): see `ls runs`"
    )


def default_model(
    root: str | Path = "runs",
    shipped: str | Path = "pretrained/emoji",
    pinned: str | Path = PINNED_MODEL_FILE,
    finished: bool = False,
) -> Path | str | None:
    """What draws where nobody names a model: the one that a Space is pinned to, the run that was last written to and can be
    drawn with, the shipped model, else None. finished: whether a run has to be, or may have checkpoints alone.
    """
    if Path(pinned).is_file():
        return Path(pinned).read_text(encoding="utf-8").strip()
    found = [
        run
        for run in map(RunFolder, Path(root).glob("*"))
        if (run.finished if finished else run.has_model or run.steps())
    ]
    if found:
        return max(
            found, key=lambda run: run.metrics.stat().st_mtime if run.metrics.exists() else 0
        ).folder
    return Path(shipped) if (Path(shipped) / MODEL_INDEX).is_file() else None
