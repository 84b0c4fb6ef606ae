"""Push the demo as a Gradio Space."""

import re
import shutil
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, SpaceCardData

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
# The metadata of every Space; `space_readme` adds the model and the versions.
SPACE_METADATA = {
    "emoji": "🎲",
    "colorFrom": "indigo",
    "colorTo": "pink",
    "sdk": "gradio",
    "app_file": "app.py",
    "license": "apache-2.0",
    "short_description": "Text-to-image diffusion from the equations",
    "tags": ["text-to-image", "diffusion"],
    "suggested_hardware": "cpu-basic",
}


def push_space(repo_id: str, model: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload the demo as a Space for one commit of a model on the Hub; return its address."""
    problems = repository_problems("the Space", repo_id)
    if problems:
        raise HubError("; ".join(problems))
    if not (PROJECT_ROOT / "requirements.txt").is_file():
        raise HubError(
            f"a Space is built from a checkout of Direct Jump, and {PROJECT_ROOT} is none. Run the "
            "command from an editable installation: pip install -e ."
        )
    name, revision, is_restricted = resolve_revision(model, token)
    api = HfApi(token=token)
    options = {"repo_type": "space", "space_sdk": "gradio", "private": private, "exist_ok": True}
    with upload_errors(f"pushing the Space {repo_id}"), tempfile.TemporaryDirectory() as scratch:
        repo = with_retries(lambda: api.create_repo(repo_id, **options).repo_id)
        folder = Path(scratch)
        for pattern in SPACE_FILES:
            for path in PROJECT_ROOT.glob(pattern):
                target = folder / path.relative_to(PROJECT_ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        (folder / PINNED_MODEL_FILE).write_text(f"{name}@{revision}\n", encoding="utf-8")
        (folder / "README.md").write_text(space_readme(name, revision), encoding="utf-8")
        address = commit_folder(api, folder, repo, "space", f"Serve {name} at {revision[:7]}")
    if is_restricted:
        print(
            f"{name} is private or gated. Give the Space a secret HF_TOKEN that can read it: "
            f"{address}/settings"
        )
    return address


def space_readme(model: str, revision: str) -> str:
    """Return the README of a Space that serves a model at a commit, with the Space's metadata."""
    data = SpaceCardData(
        title=model.rpartition("/")[2],
        sdk_version=required_gradio(),
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        models=[model],
        **SPACE_METADATA,
    )
    text = f"The demo of Direct Jump for `{model}` at commit `{revision}`."
    return f"---\n{data.to_yaml()}\n---\n\n# {model}\n\n{text}\n"


def required_gradio() -> str:
    """Return the version of Gradio that requirements.txt pins."""
    requirements = (PROJECT_ROOT / "requirements.txt").read_text(encoding="utf-8")
    (version,) = re.findall(r"^gradio==(\S+)", requirements, re.MULTILINE)
    return version
