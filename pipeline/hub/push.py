"""How a model is found, loaded and shared: `direct-jump push RUN USER/NAME`, `pull`, `ship`, `space`.

What is pushed is the layout of `pipeline.layout`, always with its text encoder, in one commit; what is loaded goes through
`pipeline.safe`. Tokens come from HF_TOKEN or `hf auth login`, and are never printed.
"""

import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import load_file as load_tensors

from pipeline.config import Config, load_file, repository_problems
from pipeline.diffusion.hub_format import PIPELINE_FILE, default_card
from pipeline.hub.client import HubError, commit_folder, disk_errors, upload_errors, with_retries
from pipeline.hub.model_card import (
    TRAINING_FACTS,
    build_card,
    is_hub_id,
    read_card,
    training_facts,
    with_base,
)
from pipeline.models.loading import load_from_folder
from pipeline.models.locate import resolve_model_folder
from pipeline.models.trusted import (
    COMPONENT_FILES,
    COMPONENTS,
    is_stable_diffusion_folder,
    read_json,
    require_safetensors,
    unet_on_hub,
    validate_index,
)
from pipeline.runs.checkpoints import describe_file
from pipeline.runs.folder import (
    ADAPTER_FILE,
    IMAGES_FOLDER,
    MODEL_INDEX,
    SHARED_CONFIG_FILE,
    RunFolder,
)

# ---- push


def check_push(config: Config) -> None:
    """Try all that the push at a run's end will need, before any time is spent: the account, the repository, the card.

    It makes the repository where there is none. HubError says what is missing; without `hub.repo_id` there is nothing to try.
    """
    if config.hub.repo_id is None:
        return
    api, dry = HfApi(token=config.hub.token), build_card(config, training_facts("", 0.0))
    if config.train.method == "lora":
        require_public_base(config.model.pretrained)
    with upload_errors("hub.repo_id", config.hub.repo_id):
        if api.whoami().get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise HubError(
                "the token of this machine may only read, expected one that may write: make one at "
                "https://huggingface.co/settings/tokens and `hf auth login`"
            )
        repo = api.create_repo(
            config.hub.repo_id, private=config.hub.private, exist_ok=True
        ).repo_id
        if config.train.method == "lora":
            require_adapter_repo(api, repo)
        api.preupload_lfs_files(
            repo, [CommitOperationAdd("README.md", str(dry).encode())]
        )  # asks, and sends nothing
        dry.validate()


def publish(config: Config, run: RunFolder) -> int:
    """Push a finished run where its settings say, and tell its address; the exit code, 1 where the push failed."""
    if config.hub.repo_id is None:
        return 0
    try:
        print(
            f"Pushed to {push(run.folder, config.hub.repo_id, private=config.hub.private, token=config.hub.token)}"
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def push(
    source: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    base: str | None = None,
) -> str:
    """Upload the model of a run or of a saved pipeline in one commit, and return its address; none where nothing has changed.

    base: of an adapter, the Hub's name of the model that it was trained from, where its settings name a folder.
    ValueError says what is wrong with the source, and then nothing is sent; HubError what went wrong with the Hub and which
    command tries again: the source is as complete as it was.
    """
    if problems := repository_problems("the repository", repo_id):
        raise HubError("; ".join(problems))
    options = f"{' --private' if private else ''}{f' --base {base}' if base else ''}"
    again = f"`direct-jump push {shlex.quote(str(source))} {repo_id}{options}`"
    with disk_errors(f"gathering {source}"), tempfile.TemporaryDirectory() as scratch:
        folder, api = Path(scratch), HfApi(token=token)
        front = assemble_repository(source, folder, base, token)
        front(repo_id)  # a card that cannot be made is told before the Hub hears of it
        with upload_errors(
            "the push", repo_id, f"; {source} is complete, push it again with {again}"
        ):
            repo = with_retries(
                lambda: api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            )
            if (folder / ADAPTER_FILE).is_file():
                with_retries(lambda: require_adapter_repo(api, repo))
            (folder / "README.md").write_text(front(repo), encoding="utf-8")
            return commit_folder(
                api, folder, repo, "model", f"Upload {Path(source).resolve().name}"
            )


def require_adapter_repo(api: HfApi, repo: str) -> None:
    """HubError where the repository for an adapter holds a pipeline, which whoever loads it would still get."""
    if api.file_exists(repo, MODEL_INDEX):
        raise HubError(
            f"{repo} holds a pipeline ({MODEL_INDEX}), expected a repository of its own for an adapter: choose another"
        )


def require_finished(run: RunFolder) -> None:
    """HubError where a run is trained on after its first end: its model and its settings are of different steps."""
    if run.config.is_file() and run.has_model and not run.finished:
        raise HubError(
            f"{run.folder} is being trained on, expected a finished run: let the training command come to its end"
        )


def require_public_base(base: str, of_hub: list[str] | None = None) -> None:
    """HubError where nobody else could load an adapter's base, a folder of this machine; of_hub: what was the Hub's."""
    name = base.partition("@")[0]
    if not (is_hub_id(name) if of_hub is None else name in of_hub):
        raise HubError(
            f"the adapter is one of {base}, expected one of a model of the Hub, which whoever gets it has: push that "
            "model, then the adapter by `direct-jump push` with --base USER/NAME"
        )


def check_adapter_shapes(run: RunFolder, base: str, token: str | None = None) -> None:
    """HubError where an adapter does not fit a model of the Hub; one whose weights are not those it was trained on is told."""
    trained_on = load_file(run.config).model.pretrained
    settings, there = unet_on_hub(base, token)
    with torch.device("meta"):
        layers = dict(UNet2DConditionModel.from_config(settings).named_modules())
    tensors = load_tensors(run.adapter / ADAPTER_FILE)
    for name in (name for name in tensors if ".lora_B." in name):
        layer = name.removeprefix("unet.").partition(".lora_")[0]
        wanted = (len(tensors[name]), *tensors[name.replace(".lora_B.", ".lora_A.")].shape[1:])
        found = tuple(layers[layer].weight.shape) if layer in layers else "missing"
        if found != wanted:
            raise HubError(
                f"the adapter does not fit {base}, whose {layer} is {found}, expected {wanted}: name the model that "
                f"it was trained on, {trained_on}, or a push of it"
            )
    here = {}
    if Path(trained_on).is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            assemble_pipeline(resolve_model_folder(trained_on), Path(scratch))
            here = {
                path.name: describe_file(path)["sha256"]
                for path in Path(scratch).glob("unet/*.safetensors")
            }
    if base != trained_on and here != there:
        what = "has other weights than" if here else "cannot be compared with"
        print(
            f"warning: {base} {what} {trained_on}, which the adapter was trained on, and may draw otherwise",
            file=sys.stderr,
        )


def assemble_repository(
    source: str | Path, target: Path, base: str | None = None, token: str | None = None
) -> Callable[[str], str]:
    """What a repository holds, made in an empty folder: a pipeline with its code and text encoder, or an adapter.

    Files that are complete as they lie are linked, so that no weights are copied. base: as for `push`. What is returned is its
    card, by the repository's name. ValueError where a stranger could not draw with it.
    """
    run = RunFolder(source)
    for place in (Path(source), Path(source).parent):  # a run's pipeline/ may be named too
        require_finished(RunFolder(place))
    if base is not None and not run.has_adapter:
        raise HubError(f"{source} is no run of an adapter, got --base {base}: leave it out")
    if run.has_adapter:
        folder, stock = run.adapter, False
        if base is None:
            known = (
                read_json(run.folder / TRAINING_FACTS)
                if (run.folder / TRAINING_FACTS).is_file()
                else {}
            )
            require_public_base(load_file(run.config).model.pretrained, known.get("of_hub"))
        else:
            require_public_base(base)
            check_adapter_shapes(run, base, token)
        for path in folder.glob("*.safetensors"):
            (target / path.name).symlink_to(path.resolve())
    else:
        folder = resolve_model_folder(str(source))
        if not (folder / MODEL_INDEX).is_file():
            raise HubError(
                f"{source} is an adapter without its run, expected a run's folder or a saved pipeline's: pass that"
            )
        stock = assemble_pipeline(folder, target, with_code=Path(source).is_dir())
    notes = next(
        (place for place in (folder, folder.parent) if (place / "config.yaml").is_file()), folder
    )
    for path in (folder / SHARED_CONFIG_FILE, notes / "config.yaml", notes / "metrics.json"):
        if path.is_file():
            shutil.copyfile(
                path, target / {"config.yaml": SHARED_CONFIG_FILE}.get(path.name, path.name)
            )
    if base is not None:
        (target / SHARED_CONFIG_FILE).write_text(
            with_base(load_file(run.config), base).to_yaml(), encoding="utf-8"
        )
    for path in (notes / IMAGES_FOLDER).glob("*.png"):
        (target / IMAGES_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(path, target / IMAGES_FOLDER / path.name)
    if (notes / TRAINING_FACTS).is_file() and (notes / "config.yaml").is_file():
        return lambda repo: str(read_card(notes, repo, base))
    if (folder / "README.md").is_file():
        text = (folder / "README.md").read_text(encoding="utf-8")
        return lambda repo: text
    w = validate_index(read_json(target / MODEL_INDEX)).get("w", 0.0)
    return lambda repo: str(default_card(repo, stock, w))


def assemble_pipeline(folder: Path, target: Path, with_code: bool = True) -> bool:
    """A saved pipeline as a stranger can load it, in an empty folder; whether its index is Stable Diffusion's.

    with_code: whether the code that lies in the folder may go along; the cache of the Hub's models may hold anybody's.
    """
    raw, code = read_json(folder / MODEL_INDEX), folder / f"{PIPELINE_FILE}.py"
    require_safetensors(folder, validate_index(raw))
    parts = [
        part
        for part, value in validate_index(raw).items()
        if part in COMPONENTS and value[0] is not None
    ]
    if {"text_encoder", "tokenizer"} <= set(parts) and with_code and code.is_file():
        files = [
            folder / MODEL_INDEX,
            code,
            *(folder / f"{name}.py" for name in get_relative_imports(code)),
        ]
        files += [
            path
            for part in parts
            for kind in (*COMPONENT_FILES, f"{raw[part][0]}.py")
            for path in (folder / part).glob(kind)
        ]
        for path in files:
            place = target / path.relative_to(folder)
            place.parent.mkdir(exist_ok=True)
            place.symlink_to(path.resolve())
    else:
        pipe = load_from_folder(folder)
        if pipe.text_encoder is None:
            raise HubError(
                f"{folder} has no text encoder, expected one in what is shared: put the config.yaml beside it that "
                "names it"
            )
        pipe.save_pretrained(target)
    return is_stable_diffusion_folder(target)
