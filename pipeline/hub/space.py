"""Push the demo as a Gradio Space."""

import shutil
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, RepoCard, SpaceCardData

from pipeline.config import repository_problems
from pipeline.hub.client import HubError, commit_folder, upload_errors, with_retries
from pipeline.models.locate import PINNED_MODEL_FILE
from pipeline.models.trusted import resolve_revision

PROJECT_ROOT = Path(__file__).parents[2]
SPACE_FILES = (
    "app.py",
    "requirements.txt",
    "LICENSE",
    "NOTICE",
    "pipeline/**/*.py",
    "pipeline/**/*.md",
)


def push_space(repo_id: str, model: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload this project's page as a Space that draws with one commit of a model of the Hub; the address of the Space."""
    if problems := repository_problems("the Space", repo_id):
        raise HubError("; ".join(problems))
    name, revision, hidden = resolve_revision(model, token)
    api = HfApi(token=token)
    with upload_errors("the Space", repo_id), tempfile.TemporaryDirectory() as scratch:
        repo = with_retries(
            lambda: (
                api.create_repo(
                    repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True
                ).repo_id
            )
        )
        folder = Path(scratch)
        for path in (path for pattern in SPACE_FILES for path in PROJECT_ROOT.glob(pattern)):
            (folder / path.relative_to(PROJECT_ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / path.relative_to(PROJECT_ROOT))
        (folder / PINNED_MODEL_FILE).write_text(f"{name}@{revision}\n", encoding="utf-8")
        (folder / "README.md").write_text(space_readme(name, revision), encoding="utf-8")
        address = commit_folder(api, folder, repo, "space", f"Serve {name} at {revision[:7]}")
    if hidden:
        print(
            f"{name} is not for everybody: the Space needs a secret HF_TOKEN that may read it, {address}/settings"
        )
    return address


def space_readme(model: str, revision: str) -> str:
    """The README of a Space: this project's front matter, with the model that it draws with."""
    ours = RepoCard.load(PROJECT_ROOT / "README.md").data.to_dict()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    data = SpaceCardData(
        **ours
        | {
            "title": model.rpartition("/")[2],
            "models": [model],
            "tags": ["text-to-image", "diffusion"],
            "python_version": python,
            "suggested_hardware": "cpu-basic",
        }
    )
    return f"---\n{data.to_yaml()}\n---\n\n# {model}\n\nThe page of Direct Jump for `{model}` at commit `{revision}`.\n"
