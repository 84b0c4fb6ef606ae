"""Decide what may be loaded: known classes, safetensors, one revision, no code."""

import contextlib
import importlib
import json
import re
from collections.abc import Iterator
from numbers import Real
from pathlib import Path

from huggingface_hub import HfApi, RepoFile, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from pipeline.runs.folder import ADAPTER_FILE, IMAGES_FOLDER, MODEL_INDEX, SHARED_CONFIG_FILE

# The classes of this package that an index may name, and their modules in pipeline/diffusion/.
OUR_CLASSES = {
    "DDPMScheduler": "scheduler",
    "ConvAutoencoder": "autoencoder",
    "PatchAutoencoder": "patches",
    "CaptionWhitening": "captions",
}
KNOWN_PIPELINES = ("TextToImagePipeline", "StableDiffusionPipeline")
COMPONENTS = ("unet", "scheduler", "text_encoder", "tokenizer", "vae", "whitening")
REQUIRED_COMPONENTS = ("unet", "scheduler")
LIBRARY_BASES = {
    "diffusers": ("ModelMixin", "SchedulerMixin"),
    "transformers": ("PreTrainedModel", "PreTrainedTokenizerBase"),
}
EXTRA_FILES = ("README.md", SHARED_CONFIG_FILE, "metrics.json", f"{IMAGES_FOLDER}/*.png")
# Configs, weights and vocabularies of a component.
COMPONENT_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
# A second copy of the weights, such as half precision (fp16) or those without averaging (non_ema).
VARIANT_PATTERN = "*.*.safetensors"
REVISION_PATTERN = re.compile(r"\w[\w./-]*")
# What an error of the Hub's client means; the first that matches counts.
DOWNLOAD_PROBLEMS = (
    (GatedRepoError, "is gated. Accept its conditions on its page, then run `hf auth login`."),
    (RepositoryNotFoundError, "is not on the Hub, or private. Check it or run `hf auth login`."),
    (RevisionNotFoundError, "has no such revision. Pass a branch, a tag or a commit."),
    (
        LocalEntryNotFoundError,
        "is not in the cache and the Hub cannot be reached. Connect once, or pass a folder.",
    ),
    (EntryNotFoundError, f"has no {MODEL_INDEX}. Pass a saved diffusers pipeline."),
    (HTTPError, "cannot be downloaded: the Hub is busy or unreachable. Try again later."),
)


class ModelError(ValueError):
    """A model that may not or cannot be loaded."""


class VariantError(ModelError):
    """A model that has its weights only as a variant, such as fp16."""


def is_repo_id(name: str) -> bool:
    """Return whether the Hub accepts this as USER/NAME."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def parse_repo_id(model: str) -> tuple[str, str | None] | None:
    """Split `USER/NAME[@REVISION]` into (repository, revision or None); None for anything else.

    Without a revision, a name whose first part is a folder here is a path.
    """
    repo_id, at, revision = model.partition("@")
    if not is_repo_id(repo_id):
        return None
    if at:
        return (repo_id, revision) if REVISION_PATTERN.fullmatch(revision) else None
    return None if Path(model).parent.is_dir() else (repo_id, None)


def require_repo_id(model: str) -> tuple[str, str | None]:
    """Return `parse_repo_id(model)`; ModelError if there is no such name."""
    parsed = parse_repo_id(model)
    if parsed is None:
        raise ModelError(
            f"{model} does not exist. Pass a run, a saved pipeline, or USER/NAME[@REVISION]."
        )
    return parsed


def download_model(model: str, variant: str | None = None, **options) -> Path:
    """Download a pipeline or an adapter at one revision and return its folder.

    model: `USER/NAME` or `USER/NAME@REVISION`.
    variant: such as fp16; its weights are downloaded too.
    options: of `huggingface_hub.snapshot_download`.
    The index is checked first, so a model that is refused is not downloaded.
    """
    repo_id, revision = require_repo_id(model)
    if revision is not None:
        options["revision"] = revision
    with download_errors(model):
        try:
            index = Path(hf_hub_download(repo_id, MODEL_INDEX, **options))
        except EntryNotFoundError as error:
            return download_adapter(repo_id, error, **options)
        # All files come from the commit of the index, even if somebody pushes meanwhile.
        options["revision"] = index.parent.name
        folder = Path(
            snapshot_download(
                repo_id,
                allow_patterns=download_patterns(index.parent),
                ignore_patterns=None if variant else VARIANT_PATTERN,
                **options,
            )
        )
    try:
        require_safetensors(folder, validate_index(read_json(folder / MODEL_INDEX)), model, variant)
    except VariantError:
        raise
    except ModelError:
        # The weights may exist only as a variant, which was not downloaded. Offline, nobody knows.
        with contextlib.suppress(OSError):
            api = HfApi(token=options.get("token"))
            info = api.model_info(repo_id, revision=options["revision"])
            require_plain_weights(repo_id, [file.rfilename for file in info.siblings or ()])
        raise
    return folder


def download_adapter(repo_id: str, missing_index: Exception, **options) -> Path:
    """Download an adapter at one revision; raise `missing_index` if the repository has none."""
    try:
        adapter = Path(hf_hub_download(repo_id, ADAPTER_FILE, **options))
    except EntryNotFoundError:
        raise missing_index from None
    options["revision"] = adapter.parent.name
    patterns = download_patterns(adapter.parent)
    return Path(snapshot_download(repo_id, allow_patterns=patterns, **options))


def download_patterns(folder: Path) -> list[str]:
    """Return the patterns of the files that are downloaded: no code and no pickles.

    folder: holds the model's index; a folder without one is an adapter's.
    """
    if not (folder / MODEL_INDEX).is_file():
        return [ADAPTER_FILE, *EXTRA_FILES]
    components = named_components(validate_index(read_json(folder / MODEL_INDEX)))
    files = [f"{component}/{kind}" for component in components for kind in COMPONENT_FILES]
    return [MODEL_INDEX, *EXTRA_FILES, *files]


def downloaded_files(folder: Path) -> list[Path]:
    """Return the files that `download_model` puts into a folder, and no others that lie there."""
    found = [path for pattern in download_patterns(folder) for path in folder.glob(pattern)]
    return [path for path in found if not path.match(VARIANT_PATTERN)]


def resolve_revision(model: str, token: str | None = None) -> tuple[str, str, bool]:
    """Return (repository, 40-hex commit, whether access is restricted) of a model on the Hub now.

    ModelError if it is neither an adapter nor a pipeline that may be loaded.
    """
    repo_id, revision = require_repo_id(model)
    with download_errors(model):
        info = HfApi(token=token).model_info(repo_id, revision=revision)
        names = [file.rfilename for file in info.siblings or ()]
        if MODEL_INDEX in names or ADAPTER_FILE not in names:
            index = hf_hub_download(repo_id, MODEL_INDEX, revision=info.sha, token=token)
            validate_index(read_json(Path(index)))
            require_plain_weights(repo_id, names)
    return repo_id, str(info.sha), bool(info.private or info.gated)


def files_on_hub(repo_id: str, revision: str, token: str | None = None) -> list[str]:
    """Return the files of a commit on the Hub that `download_model` downloads."""
    with download_errors(repo_id):
        names = HfApi(token=token).list_repo_files(repo_id, revision=revision)
        file = MODEL_INDEX if MODEL_INDEX in names else ADAPTER_FILE
        folder = Path(hf_hub_download(repo_id, file, revision=revision, token=token)).parent
    patterns = download_patterns(folder)
    return sorted(
        filter_repo_objects(names, allow_patterns=patterns, ignore_patterns=VARIANT_PATTERN)
    )


def unet_on_hub(model: str, token: str | None = None) -> tuple[dict, dict[str, str]]:
    """Return (config, sha256 by file name of the weights) of a UNet on the Hub.

    No weights are downloaded.
    """
    repo_id, revision, _ = resolve_revision(model, token)
    with download_errors(model):
        config = hf_hub_download(repo_id, "unet/config.json", revision=revision, token=token)
        hashes = {}
        for file in HfApi(token=token).list_repo_tree(repo_id, "unet", revision=revision):
            if isinstance(file, RepoFile) and file.lfs and file.path.endswith(".safetensors"):
                hashes[Path(file.path).name] = file.lfs.sha256
    return read_json(Path(config)), hashes


def read_json(file: Path) -> dict:
    """Return the JSON object in a file; ModelError if there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{file} is corrupt ({error}). Save the pipeline again.") from error
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise ModelError(f"{file} holds a {kind}, not a JSON object. Save the pipeline again.")
    return found


def validate_index(index: dict) -> dict:
    """Return an index that names only classes of this package, diffusers and transformers.

    Other components of a Stable Diffusion pipeline, such as its safety checker, are left out.
    ModelError if a component, a setting or the pipeline itself is not a known one.
    """
    # Imports diffusers, which takes seconds; a mistyped path is reported without it.
    from pipeline.diffusion.hub_format import PIPELINE_SETTINGS, PRIVATE_KEY, STABLE_DIFFUSION_W

    name = index.get("_class_name")
    if isinstance(name, list) and name:
        name = name[-1]
    if name not in KNOWN_PIPELINES:
        known = " or a ".join(KNOWN_PIPELINES)
        raise ModelError(f"This model is a {name}, not a {known}. Load it with its own library.")
    private = index.get(PRIVATE_KEY)
    if isinstance(private, dict):
        index = index | private
    missing = [component for component in REQUIRED_COMPONENTS if not index.get(component)]
    if missing:
        raise ModelError(
            f"{MODEL_INDEX} names no {' and no '.join(missing)}. Save the pipeline again."
        )
    settings = {key: index[key] for key in PIPELINE_SETTINGS if index.get(key) is not None}
    for key, value in settings.items():
        if not isinstance(value, Real):
            raise ModelError(f"{key} in {MODEL_INDEX} must be a number, got {value!r}.")
    if name != KNOWN_PIPELINES[0]:
        settings.setdefault("w", STABLE_DIFFUSION_W)
    components = {
        part: resolve_component(part, index[part]) for part in COMPONENTS if part in index
    }
    return settings | components | {"_class_name": KNOWN_PIPELINES[0]}


def named_components(index: dict) -> list[str]:
    """Return the names of the components that a validated index has a class for."""
    return [part for part in COMPONENTS if index.get(part, [None])[0] is not None]


def is_stable_diffusion_folder(folder: Path) -> bool:
    """Return whether the index of a saved pipeline is a Stable Diffusion index."""
    return read_json(folder / MODEL_INDEX).get("_class_name") == KNOWN_PIPELINES[1]


def resolve_component(part: str, value: object) -> list[str | None]:
    """Return the [module, class] that loads one component; [None, None] if there is none.

    value: what the index says, [library or module, class].
    ModelError for a class that is not of this package, diffusers or transformers.
    """
    library, name = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
    if library is None:
        return [None, None]
    if isinstance(library, str) and isinstance(name, str):
        if OUR_CLASSES.get(name) == library.rpartition(".")[2]:
            return [f"pipeline.diffusion.{OUR_CLASSES[name]}", name]
        if library in LIBRARY_BASES and is_model_class(library, name):
            return [library, name]
    raise ModelError(
        f"Its {part} is {name!r} of {library!r}, "
        "not a class of diffusers, transformers or this package. "
        "Its code is not run here: read it, then load it with diffusers and trust_remote_code."
    )


def is_model_class(library: str, name: str) -> bool:
    """Return whether a library has a class of this name that is a model, scheduler or tokenizer."""
    module = importlib.import_module(library)
    found = getattr(module, name, None)
    bases = tuple(getattr(module, base) for base in LIBRARY_BASES[library])
    return isinstance(found, type) and issubclass(found, bases)


def require_safetensors(
    folder: Path, index: dict, name: str | None = None, variant: str | None = None
) -> None:
    """Raise ModelError if a network of a saved pipeline has no safetensors: a pickle may run code.

    name: what to call the model; None is its folder.
    variant: which weights are wanted; None are the plain ones.
    """
    model = name or str(folder)
    components = [folder / part for part in named_components(index)]
    networks = [part for part in components if (part / "config.json").is_file()]
    unsafe = [part.name for part in networks if not any(part.glob("*.safetensors"))]
    if unsafe:
        raise ModelError(
            f"{model} has no safetensors for its {' and '.join(unsafe)}, "
            "and a pickle may run code. Save it again with safe_serialization=True."
        )
    if variant is None:
        weights = [path.relative_to(folder).as_posix() for path in folder.glob("*/*.safetensors")]
        require_plain_weights(model, weights)


def require_plain_weights(model: str, names: list[str]) -> None:
    """Raise VariantError if a component has its safetensors only as a variant, such as fp16.

    names: the model's files, relative to its folder.
    """
    for component in COMPONENTS:
        weights = [Path(name) for name in names if re.match(rf"{component}/.*\.safetensors$", name)]
        if weights and all(path.match(VARIANT_PATTERN) for path in weights):
            variant = weights[0].stem.rpartition(".")[2].partition("-")[0]
            raise VariantError(
                f"{model} has only {variant} weights. Load them with "
                f"TextToImagePipeline.from_pretrained({model!r}, variant={variant!r})."
            )


@contextlib.contextmanager
def download_errors(model: str) -> Iterator[None]:
    """Turn an error of the Hub's client while it downloads into a ModelError."""
    try:
        yield
    except (HTTPError, EntryNotFoundError) as error:
        problem = next(text for kind, text in DOWNLOAD_PROBLEMS if isinstance(error, kind))
        raise ModelError(f"{model} {problem}") from error
    except (OSError, RuntimeError, XetDownloadError) as error:
        message = " ".join(str(error).split()).rstrip(".")
        raise ModelError(
            f"{model} cannot be downloaded: {message}. "
            "Check disk space and the connection, then retry."
        ) from error
