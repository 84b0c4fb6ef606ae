"""What of a saved model may be loaded, from this disk or the Hub: classes that are known, safetensors, one revision, no code."""

import contextlib
import importlib
import json
import re
from collections.abc import Iterator
from numbers import Real
from pathlib import Path

from pipeline.runs.folder import ADAPTER_FILE, IMAGES_FOLDER, MODEL_INDEX, SHARED_CONFIG_FILE

OUR_CLASSES = {
    "DDPMScheduler": "scheduler",
    "PatchAutoencoder": "patches",
    "CaptionWhitening": "captions",
}  # class -> module
KNOWN_PIPELINES = ("TextToImagePipeline", "StableDiffusionPipeline")
COMPONENTS = ("unet", "scheduler", "text_encoder", "tokenizer", "vae", "whitening")
REQUIRED_COMPONENTS = ("unet", "scheduler")
LIBRARY_BASES = {
    "diffusers": ("ModelMixin", "SchedulerMixin"),
    "transformers": ("PreTrainedModel", "PreTrainedTokenizerBase"),
}
EXTRA_FILES = ("README.md", SHARED_CONFIG_FILE, "metrics.json", f"{IMAGES_FOLDER}/*.png")
COMPONENT_FILES = (
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
)  # of a component: settings, weights, vocabularies
VARIANT_PATTERN = (
    "*.*.safetensors"  # half precision, weights without an average, ...: the same again
)


class ModelError(ValueError):
    """A model that is not loaded: what was found, what is expected, how to mend it."""


class VariantError(ModelError):
    """A model whose weights are of a variant alone, such as fp16."""


def parse_repo_id(model: str) -> tuple[str, str | None] | None:
    """(repository, revision or None) where a model's name is the Hub's `user/name` or `user/name@revision`, else None.

    Without a revision, a name whose first part is a folder here is a path.
    """
    found = re.fullmatch(r"(\w[\w-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", model)
    if found is None or (found[2] is None and Path(model).parent.is_dir()):
        return None
    return found[1], found[2]


def download_model(model: str, variant: str | None = None, **options) -> Path:
    """The folder of a model of the Hub, or of an adapter, at one revision: what loads it, and what is shown of it.

    model: `user/name` or `user/name@revision`. variant: such as fp16, whose weights come too. options:
    huggingface_hub.snapshot_download's. The index is read first, so a
    model that is refused is not downloaded.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    if (found := parse_repo_id(model)) is None:
        raise ModelError(
            f"{model} is not a folder here, expected one or a model of the Hub: pass user/name[@revision]"
        )
    repo, revision = found
    options |= {} if revision is None else {"revision": revision}
    with download_errors(model):
        try:
            index = Path(hf_hub_download(repo, MODEL_INDEX, **options))
        except EntryNotFoundError as error:
            return download_adapter(repo, error, **options)
        wanted = download_patterns(index.parent)
        pinned = options | {
            "revision": index.parent.name
        }  # of all files, whatever is pushed meanwhile
        folder = Path(
            snapshot_download(
                repo,
                allow_patterns=wanted,
                ignore_patterns=None if variant else VARIANT_PATTERN,
                **pinned,
            )
        )
    try:
        require_safetensors(folder, validate_index(read_json(folder / MODEL_INDEX)), model, variant)
    except VariantError:
        raise
    except ModelError:
        with contextlib.suppress(
            OSError
        ):  # what was left out may be the reason, if the Hub can be asked
            info = HfApi(token=options.get("token")).model_info(repo, revision=pinned["revision"])
            require_plain_weights(repo, [file.rfilename for file in info.siblings])
        raise
    return folder


def require_plain_weights(model: str, names: list[str]) -> None:
    """VariantError where, of a model's file names, the safetensors of any component are all variants, such as fp16."""
    for part in COMPONENTS:
        found = [
            Path(name)
            for name in names
            if name.startswith(f"{part}/") and name.endswith(".safetensors")
        ]
        if not found or not all(path.match(VARIANT_PATTERN) for path in found):
            continue
        kind = found[0].stem.rpartition(".")[2].partition("-")[0]
        raise VariantError(
            f"{model} has its weights as {kind} alone, expected plain ones: TextToImagePipeline.from_pretrained("
            f"{model!r}, variant={kind!r}) loads it, and its save_pretrained makes a folder that loads everywhere"
        )


def download_adapter(repo: str, missing: Exception, **options) -> Path:
    """The folder of an adapter of the Hub at one revision; `missing` again where the repository holds none either."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        found = Path(hf_hub_download(repo, ADAPTER_FILE, **options))
    except EntryNotFoundError:
        raise missing from None
    pinned = options | {"revision": found.parent.name}
    return Path(snapshot_download(repo, allow_patterns=download_patterns(found.parent), **pinned))


def download_patterns(folder: Path) -> list[str]:
    """What is had of a pipeline whose index lies in a folder, or of an adapter, which has none: no code and no pickles."""
    if not (folder / MODEL_INDEX).is_file():
        return [ADAPTER_FILE, *EXTRA_FILES]
    parts = [
        name
        for name, value in validate_index(read_json(folder / MODEL_INDEX)).items()
        if name in COMPONENTS and value[0] is not None
    ]
    return [
        MODEL_INDEX,
        *EXTRA_FILES,
        *(f"{part}/{kind}" for part in parts for kind in COMPONENT_FILES),
    ]


def downloaded_files(folder: Path) -> list[Path]:
    """The files of a folder that `download` puts there, whatever another tool has put beside them."""
    return [
        path
        for pattern in download_patterns(folder)
        for path in folder.glob(pattern)
        if not path.match(VARIANT_PATTERN)
    ]


def resolve_revision(model: str, token: str | None = None) -> tuple[str, str, bool]:
    """(repository, 40-hex commit, whether it is kept from strangers) of a model of the Hub as it is now.

    ModelError for one that is neither a pipeline to be loaded here nor an adapter.
    """
    from huggingface_hub import HfApi, hf_hub_download

    if (found := parse_repo_id(model)) is None:
        raise ModelError(
            f"{model} is not a model of the Hub, expected user/name or user/name@revision: push it first"
        )
    with download_errors(model):
        info = HfApi(token=token).model_info(found[0], revision=found[1])
        names = [file.rfilename for file in info.siblings]
        if MODEL_INDEX in names or ADAPTER_FILE not in names:
            validate_index(
                read_json(
                    Path(hf_hub_download(found[0], MODEL_INDEX, revision=info.sha, token=token))
                )
            )
            require_plain_weights(found[0], names)
    return found[0], info.sha, bool(info.private or info.gated)


def unet_on_hub(model: str, token: str | None = None) -> tuple[dict, dict[str, str]]:
    """(settings, sha256 of each file of the weights) of the UNet of a pipeline of the Hub; no weights are downloaded."""
    from huggingface_hub import HfApi, hf_hub_download

    repo, revision, _ = resolve_revision(model, token)
    with download_errors(model):
        settings = read_json(
            Path(hf_hub_download(repo, "unet/config.json", revision=revision, token=token))
        )
        tree = HfApi(token=token).list_repo_tree(repo, "unet", revision=revision)
        sums = {
            Path(file.path).name: file.lfs and file.lfs.sha256
            for file in tree
            if file.path.endswith(".safetensors")
        }
    return settings, sums


def read_json(index: Path) -> dict:
    """What a JSON file of names and values holds, such as a model_index.json."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(
            f"{index} is damaged ({error}), expected JSON: save the pipeline again"
        ) from error
    if not isinstance(found, dict):
        raise ModelError(
            f"{index} holds a {type(found).__name__}, expected names and values: save the pipeline again"
        )
    return found


def validate_index(index: dict) -> dict:
    """An index by classes of this package, diffusers and transformers alone, whatever code came along; ModelError otherwise.

    What a Stable Diffusion pipeline has beside our components, such as its safety checker, is left out.
    """
    kind = index.get("_class_name")
    name = kind[-1] if isinstance(kind, list) and kind else kind
    if name not in KNOWN_PIPELINES:
        raise ModelError(
            f"this model is a {name}, expected a {' or a '.join(KNOWN_PIPELINES)}: load it with its own library"
        )
    from pipeline.diffusion.hub_format import PIPELINE_SETTINGS, PRIVATE_KEY, STABLE_DIFFUSION_W

    private = index.get(PRIVATE_KEY, {})
    index = index | (private if isinstance(private, dict) else {})
    if missing := [part for part in REQUIRED_COMPONENTS if not index.get(part)]:
        raise ModelError(
            f"{MODEL_INDEX} names no {' and no '.join(missing)}, expected both {' and '.join(REQUIRED_COMPONENTS)}: save it again"
        )
    settings = {key: index[key] for key in PIPELINE_SETTINGS if index.get(key) is not None}
    if wrong := [
        f"{key} {value!r}" for key, value in settings.items() if not isinstance(value, Real)
    ]:
        raise ModelError(
            f"{MODEL_INDEX} has {' and '.join(wrong)}, expected numbers: save it again"
        )
    if name != KNOWN_PIPELINES[0]:
        settings.setdefault("w", STABLE_DIFFUSION_W)
    return (
        settings
        | {part: resolve_component(part, index[part]) for part in COMPONENTS if part in index}
        | {"_class_name": KNOWN_PIPELINES[0]}
    )


def is_stable_diffusion_folder(folder: Path) -> bool:
    """Whether a saved pipeline's index is Stable Diffusion's."""
    return read_json(folder / MODEL_INDEX).get("_class_name") == KNOWN_PIPELINES[1]


def resolve_component(part: str, value: object) -> list[str | None]:
    """[module, class] of one component, of this package, diffusers or transformers; [None, None] where there is none."""
    library, name = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
    if library is None:
        return [None, None]
    if isinstance(library, str) and isinstance(name, str):
        if OUR_CLASSES.get(name) == library.rpartition(".")[2]:
            return [f"pipeline.diffusion.{OUR_CLASSES[name]}", name]
        if library in LIBRARY_BASES:
            module = importlib.import_module(library)
            found = getattr(module, name, None)
            if isinstance(found, type) and issubclass(
                found, tuple(getattr(module, base) for base in LIBRARY_BASES[library])
            ):
                return [library, name]
    raise ModelError(
        f"its {part} is {name!r} of {library!r}, expected a class of diffusers, transformers or this package: code "
        "of a model is not run here, so read it and load it by diffusers' trust_remote_code"
    )


def require_safetensors(
    folder: Path, index: dict, name: str | None = None, variant: str | None = None
) -> None:
    """ModelError where a network of a saved pipeline has no safetensors: whatever else its weights are in may run code.

    name: what to call the model, if not by its folder. variant: which weights are wanted; None are the plain ones.
    """
    networks = [
        part
        for part in COMPONENTS
        if index.get(part, [None])[0] and (folder / part / "config.json").is_file()
    ]
    if unsafe := [part for part in networks if not any((folder / part).glob("*.safetensors"))]:
        raise ModelError(
            f"{name or folder} cannot be loaded: its {' and '.join(unsafe)} has no safetensors, expected them, "
            "since a pickle may run code: have it saved again with safe_serialization=True"
        )
    if variant is None:
        require_plain_weights(
            name or str(folder),
            [f"{path.parent.name}/{path.name}" for path in folder.glob("*/*.safetensors")],
        )


@contextlib.contextmanager
def download_errors(model: str) -> Iterator[None]:
    """Whatever the Hub's client says about getting a model, in one sentence."""
    from huggingface_hub import errors

    reasons = {  # the first that fits
        errors.GatedRepoError: "is gated and this account may not read it, expected its conditions to be accepted: do so on its "
        "page, then `hf auth login`",
        errors.RepositoryNotFoundError: "is not on the Hub, or private and not yours, and no folder here: check the name, or "
        "`hf auth login`",
        errors.RevisionNotFoundError: "has no such revision, expected a branch, a tag or a commit: leave it out for the newest",
        errors.LocalEntryNotFoundError: "is neither a folder here nor in the cache, and the Hub cannot be reached: connect once, "
        "or pass a folder",
        errors.EntryNotFoundError: f"holds no {MODEL_INDEX}, expected a saved diffusers pipeline: check the name",
        errors.HTTPError: "cannot be had from the Hub, which is busy or out of reach: try again later",
    }
    try:
        yield
    except (errors.HTTPError, errors.EntryNotFoundError) as error:
        reason = next(words for kind, words in reasons.items() if isinstance(error, kind))
        raise ModelError(f"{model} {reason}") from error
    except (
        OSError,
        RuntimeError,
        errors.XetDownloadError,
    ) as error:  # a full disk, or files that do not get through
        said = " ".join(str(error).split())
        raise ModelError(
            f"{model} could not be downloaded ({said}), expected all of it: mend that and try again"
        ) from error
