"""Push the demo as a Gradio Space."""

import re
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, SpaceCardData, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError

from pipeline.config import repository_problems
from pipeline.hub.client import HubError, commit_folder, upload_errors, with_retries
from pipeline.models.locate import PINNED_MODEL_FILE
from pipeline.models.trusted import files_on_hub, resolve_revision

PROJECT_ROOT = Path(__file__).parents[2]
SPACE_FILES = (
    "app.py",
    "LICENSE",
    "NOTICE",
    "pipeline/**/*.py",
    "pipeline/**/*.md",
)
ZERO_GPU = "zero-a10g"
PAYMENT_REQUIRED = 402
# ZeroGPU brings its own torch. Gradio's extra [mcp], which every Space gets, has a lower pydantic.
NOT_PINNED = ("torch", "pydantic")
# The metadata of every Space; `space_readme` adds the model and Gradio's version.
SPACE_METADATA = {
    "emoji": "🎲",
    "colorFrom": "indigo",
    "colorTo": "pink",
    "sdk": "gradio",
    "python_version": "3.12.12",  # ZeroGPU builds anything but this and 3.10.13 on 3.10
    "app_file": "app.py",
    "license": "apache-2.0",
    "short_description": "Text-to-image diffusion from the equations",
    "tags": ["text-to-image", "diffusion"],
    "suggested_hardware": ZERO_GPU,
    "startup_duration_timeout": "1h",
}


def push_space(
    repo_id: str,
    model: str,
    *,
    hardware: str = ZERO_GPU,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Upload the demo as a Space for one commit of a model on the Hub; return its address.

    hardware: of a new Space, such as zero-a10g or cpu-basic.
    """
    problems = repository_problems("the Space", repo_id)
    if problems:
        raise HubError("; ".join(problems))
    if not (PROJECT_ROOT / "requirements.txt").is_file():
        raise HubError(
            f"a Space is built from a checkout of Direct Jump, and {PROJECT_ROOT} is none. Run the "
            "command from an editable installation: pip install -e ."
        )
    name, revision, is_restricted = resolve_revision(model, token)
    # The builder has no token that could read a restricted model.
    files = [] if is_restricted else files_on_hub(name, revision, token)
    api = HfApi(token=token)
    with upload_errors(f"pushing the Space {repo_id}"), tempfile.TemporaryDirectory() as scratch:
        repo = create_space(api, repo_id, hardware, private)
        folder = Path(scratch)
        for pattern in SPACE_FILES:
            for path in PROJECT_ROOT.glob(pattern):
                target = folder / path.relative_to(PROJECT_ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        written = {
            PINNED_MODEL_FILE: f"{name}@{revision}\n",
            "requirements.txt": space_requirements(),
            "README.md": space_readme(name, revision, files),
        }
        for file, text in written.items():
            (folder / file).write_text(text, encoding="utf-8")
        address = commit_folder(api, folder, repo, "space", f"Serve {name} at {revision[:7]}")
    if is_restricted:
        print(
            f"{name} is private or gated. Give the Space a secret HF_TOKEN that can read it: "
            f"{address}/settings"
        )
    return address


def create_space(api: HfApi, repo_id: str, hardware: str, private: bool) -> str:
    """Create a Space if there is none and return its name; HubError if the account may not."""
    options = {"repo_type": "space", "space_sdk": "gradio", "private": private, "exist_ok": True}
    try:
        options["space_hardware"] = hardware
        return with_retries(lambda: api.create_repo(repo_id, **options).repo_id)
    except HfHubHTTPError as error:
        if error.response.status_code != PAYMENT_REQUIRED:
            raise
        raise HubError(
            f"{repo_id} cannot be created on {hardware} by this account (status 402). A free "
            f"account has two Gradio Spaces on ZeroGPU: pass --hardware {ZERO_GPU}, or push to one "
            "of the two. Other hardware takes PRO: https://huggingface.co/pro"
        ) from error


def space_readme(model: str, revision: str, files: list[str]) -> str:
    """Return the README of a Space that serves a model at a commit, with the Space's metadata.

    files: of the model, which the Space has before it starts.
    """
    metadata: dict = dict(SPACE_METADATA)
    # A comma or a space separates what the entry names.
    preloaded = [file for file in files if not re.search(r"[\s,]", file)]
    images = [file for file in preloaded if file.endswith(".png")]
    if preloaded:
        metadata["preload_from_hub"] = [f"{model} {','.join(preloaded)} {revision}"]
    if images:
        metadata["thumbnail"] = hf_hub_url(model, images[0], revision=revision)
    data = SpaceCardData(
        title=model.rpartition("/")[2], sdk_version=required_gradio(), models=[model], **metadata
    )
    text = f"The demo of Direct Jump for `{model}` at commit `{revision}`."
    return f"---\n{data.to_yaml()}\n---\n\n# {model}\n\n{text}\n"


def space_requirements() -> str:
    """Return requirements.txt for a Space, which chooses the versions of NOT_PINNED itself."""
    requirements = (PROJECT_ROOT / "requirements.txt").read_text(encoding="utf-8")
    return re.sub(rf"^({'|'.join(NOT_PINNED)})==.*", r"\1", requirements, flags=re.MULTILINE)


def required_gradio() -> str:
    """Return the version of Gradio that requirements.txt pins."""
    requirements = (PROJECT_ROOT / "requirements.txt").read_text(encoding="utf-8")
    (version,) = re.findall(r"^gradio==(\S+)", requirements, re.MULTILINE)
    return version
