"""Push runs and saved pipelines to the Hub, in one commit and always with the text encoder.

Tokens come from HF_TOKEN, `hf auth login` or the settings, and are never printed.
"""

import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import load_file as load_tensors

from pipeline.config import Config, load_file, repository_problems
from pipeline.diffusion.hub_format import PIPELINE_FILE, default_card
from pipeline.hub import model_card
from pipeline.hub.client import HubError, commit_folder, disk_errors, upload_errors, with_retries
from pipeline.models import trusted
from pipeline.models.loading import load_from_folder
from pipeline.models.locate import resolve_model_folder
from pipeline.runs.checkpoints import describe_file
from pipeline.runs.folder import (
    ADAPTER_FILE,
    IMAGES_FOLDER,
    MODEL_INDEX,
    SHARED_CONFIG_FILE,
    RunFolder,
)


def check_push(config: Config) -> None:
    """Try what the push after training will need: the account, the repository, the card.

    It creates the repository if there is none. HubError says what is missing.
    Without `hub.repo_id` there is nothing to try.
    """
    repo_id = config.hub.repo_id
    if repo_id is None:
        return
    try:
        _try_repository(config, repo_id)
    except HubError as error:
        error.exit_code = 2  # bad input: no training was begun
        raise


def _try_repository(config: Config, repo_id: str) -> None:
    """Raise HubError if the account, the repository or the card is not fit for a push."""
    facts = model_card.training_facts("", 0.0)
    card = model_card.build_card(*model_card.without_local_paths(config, facts))
    is_adapter = config.train.method == "lora"
    if is_adapter:
        require_public_base(str(config.model.pretrained))
    api = HfApi(token=config.hub.token)
    with upload_errors(f"checking hub.repo_id {repo_id}"):
        if api.whoami().get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise HubError(
                "The token can only read. Create one with write access at "
                "https://huggingface.co/settings/tokens, then run `hf auth login`."
            )
        repo = api.create_repo(repo_id, private=config.hub.private, exist_ok=True).repo_id
        if is_adapter:
            require_adapter_repo(api, repo)
        # Checks the permission to write; so small a file is not sent.
        api.preupload_lfs_files(repo, [CommitOperationAdd("README.md", str(card).encode())])
        card.validate()


def publish(config: Config, run: RunFolder) -> int:
    """Push a finished run if its settings ask for it and return the exit code: 0 done, 1 failed."""
    hub = config.hub
    if hub.repo_id is None:
        return 0
    try:
        address = push(run.folder, hub.repo_id, private=hub.private, token=hub.token)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Pushed to {address}")
    return 0


def push(
    source: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    base: str | None = None,
) -> str:
    """Upload a run or a saved pipeline in one commit and return its address; no change, no commit.

    base: the name on the Hub of an adapter's base model, if its settings name a folder.
    ValueError if the source cannot be pushed; nothing is sent then.
    HubError if the Hub refuses or fails; it gives the command that tries again.
    """
    problems = repository_problems("the repository", repo_id)
    if problems:
        raise HubError("; ".join(problems))
    options = f"{' --private' if private else ''}{f' --base {base}' if base else ''}"
    command = f"direct-jump push {shlex.quote(str(source))} {repo_id}{options}"
    api = HfApi(token=token)
    with disk_errors(f"gathering {source}"), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        card_for = assemble_repository(source, folder, base, token)
        card_for(repo_id)  # a card that cannot be made is reported before anything is sent
        hint = f"{source} is complete. Push it again with `{command}`."
        with upload_errors(f"pushing to {repo_id}", hint):
            repo = with_retries(
                lambda: api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            )
            if (folder / ADAPTER_FILE).is_file():
                with_retries(lambda: require_adapter_repo(api, repo))
            (folder / "README.md").write_text(card_for(repo), encoding="utf-8")
            message = f"Upload {Path(source).resolve().name}"
            return commit_folder(api, folder, repo, "model", message)


def require_adapter_repo(api: HfApi, repo: str) -> None:
    """Raise HubError if an adapter's repository holds a pipeline: loaders would still get that."""
    if api.file_exists(repo, MODEL_INDEX):
        raise HubError(
            f"{repo} holds a pipeline ({MODEL_INDEX}). Push an adapter to its own repository."
        )


def require_finished(run: RunFolder) -> None:
    """Raise HubError if a finished run trains on: its model and its settings differ in steps."""
    if run.config.is_file() and run.has_model and not run.finished:
        raise HubError(f"{run.folder} is being trained. Wait until the training command has ended.")


def require_public_base(base: str, hub_names: list[str] | None = None) -> None:
    """Raise HubError if an adapter's base model is a folder, which nobody else could load.

    hub_names: the names that were on the Hub when the run ended; None if that was not recorded.
    """
    if not model_card.is_hub_id(base.partition("@")[0], hub_names):
        raise HubError(
            f"The adapter's base model {base} is not on the Hub, so nobody else could load it. "
            "Push it first, then push the adapter with --base USER/NAME."
        )


def check_adapter_shapes(run: RunFolder, base: str, token: str | None = None) -> None:
    """Raise HubError if an adapter does not fit a model on the Hub.

    Warn if the weights of that model are not those that the adapter was trained on.
    """
    trained_on = str(load_file(run.config).model.pretrained)
    config, hub_hashes = trusted.unet_on_hub(base, token)
    with torch.device("meta"):
        unet = cast("UNet2DConditionModel", UNet2DConditionModel.from_config(config))
    layers = dict(unet.named_modules())
    tensors = load_tensors(run.adapter / ADAPTER_FILE)
    for name, up in tensors.items():
        if ".lora_B." not in name:
            continue
        layer = name.removeprefix("unet.").partition(".lora_")[0]
        down = tensors[name.replace(".lora_B.", ".lora_A.")]
        expected = (len(up), *down.shape[1:])
        found = tuple(layers[layer].weight.shape) if layer in layers else "missing"
        if found != expected:
            raise HubError(
                f"The adapter does not fit {base}: {layer} is {found}, expected {expected}. "
                f"Pass the model that it was trained on, {trained_on}, or a push of it."
            )
    if base == trained_on:
        return
    hashes = {}
    if Path(trained_on).is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            assemble_pipeline(resolve_model_folder(trained_on), Path(scratch))
            weights = Path(scratch).glob("unet/*.safetensors")
            hashes = {path.name: describe_file(path)["sha256"] for path in weights}
    if hashes != hub_hashes:
        problem = "has other weights than" if hashes else "cannot be compared with"
        print(
            f"warning: {base} {problem} {trained_on}, which the adapter was trained on. "
            "Its samples may differ.",
            file=sys.stderr,
        )


def assemble_repository(
    source: str | Path, target: Path, base: str | None = None, token: str | None = None
) -> Callable[[str], str]:
    """Fill an empty folder with what a repository holds; return its card as a function of its name.

    It holds a pipeline with its code and text encoder, or an adapter. Complete files are linked,
    not copied. base: as for `push`. ValueError if other users could not load it.
    """
    run = RunFolder(source)
    for folder in (Path(source), Path(source).parent):  # the source may be a run's pipeline/
        require_finished(RunFolder(folder))
    if base is not None and not run.has_adapter:
        raise HubError(f"{source} is not the run of an adapter. Leave out --base {base}.")
    stock = False
    if run.has_adapter:
        folder = run.adapter
        link_adapter(run, target, base, token)
    else:
        folder = resolve_model_folder(str(source))
        if not (folder / MODEL_INDEX).is_file():
            raise HubError(f"{source} is an adapter without its run. Pass the run's folder.")
        stock = assemble_pipeline(folder, target, with_code=Path(source).is_dir())
    # The settings, measurements and images lie beside the pipeline, or in its run.
    notes = folder if (folder / "config.yaml").is_file() else folder.parent
    if not (notes / "config.yaml").is_file():
        notes = folder
    for path in (folder / SHARED_CONFIG_FILE, notes / "metrics.json"):
        if path.is_file():
            shutil.copyfile(path, target / path.name)
    for path in (notes / IMAGES_FOLDER).glob("*.png"):
        (target / IMAGES_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(path, target / IMAGES_FOLDER / path.name)
    if (notes / "config.yaml").is_file():
        settings = model_card.without_local_paths(*model_card.read_settings(notes, base))
        (target / SHARED_CONFIG_FILE).write_text(settings[0].to_yaml(), encoding="utf-8")
        if (notes / model_card.TRAINING_FACTS).is_file():
            return lambda repo: str(model_card.read_card(notes, repo, settings))
    if (folder / "README.md").is_file():
        text = (folder / "README.md").read_text(encoding="utf-8")
        return lambda repo: text
    w = trusted.validate_index(trusted.read_json(target / MODEL_INDEX)).get("w", 0.0)
    return lambda repo: str(default_card(repo, stock, w))


def link_adapter(run: RunFolder, target: Path, base: str | None, token: str | None) -> None:
    """Link a run's adapter into an empty folder; HubError if other users could not load it."""
    if base is None:
        facts = run.folder / model_card.TRAINING_FACTS
        known = trusted.read_json(facts) if facts.is_file() else {}
        require_public_base(str(load_file(run.config).model.pretrained), known.get("of_hub"))
    else:
        require_public_base(base)
        check_adapter_shapes(run, base, token)
    for path in run.adapter.glob("*.safetensors"):
        (target / path.name).symlink_to(path.resolve())


def assemble_pipeline(folder: Path, target: Path, with_code: bool = True) -> bool:
    """Fill an empty folder with a saved pipeline that other users can load.

    with_code: whether the code in the source folder is our own; the Hub's cache may hold anybody's.
    Return whether the index is a Stable Diffusion index.
    """
    raw_index = trusted.read_json(folder / MODEL_INDEX)
    index = trusted.validate_index(raw_index)
    trusted.require_safetensors(folder, index)
    components = trusted.named_components(index)
    code = folder / f"{PIPELINE_FILE}.py"
    if {"text_encoder", "tokenizer"} <= set(components) and with_code and code.is_file():
        files = [folder / MODEL_INDEX, code]
        files += [folder / f"{name}.py" for name in get_relative_imports(code)]
        for component in components:
            for pattern in (*trusted.COMPONENT_FILES, f"{raw_index[component][0]}.py"):
                files += (folder / component).glob(pattern)
        for path in files:
            link = target / path.relative_to(folder)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(path.resolve())
    else:
        pipe = load_from_folder(folder)
        if pipe.text_encoder is None:
            raise HubError(
                f"{folder} has no text encoder. Put the config.yaml that names it into the folder."
            )
        pipe.save_pretrained(target)
    return trusted.is_stable_diffusion_folder(target)
