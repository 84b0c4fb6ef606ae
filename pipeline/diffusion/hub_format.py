"""How a pipeline is saved for users without this package: diffusers' index and the code it names.

This file travels with the pipeline, as guidance.py does. Another user's own save and push therefore
keep the format:

    model_index.json            "_class_name": ["pipeline", "TextToImagePipeline"],
                                "scheduler": ["scheduler", "DDPMScheduler"]
    pipeline.py guidance.py hub_format.py    the pipeline, and the files beside it that it imports
    scheduler/scheduler.py vae/patches.py    each component that diffusers and transformers lack
    scheduler/scheduler_config.json unet/    as stock classes read them, without any of this code

Where Stable Diffusion's own pipeline generates the same images from the same parts, the index is
Stable Diffusion's, and stock diffusers loads it without remote code. Our settings are then under
PRIVATE_KEY, which diffusers does not read.
"""

import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
)
from transformers import CLIPTextModel

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline as Base
else:
    Base = object  # diffusers accepts one pipeline class per file, so this one is none

LIBRARIES = ("diffusers", "transformers")  # users without this package have their classes
PIPELINE_FILE = "pipeline"  # the name that diffusers looks for
SHARD_PATTERN = r"(?:-\d+-of-\d+)?"
# A file of weights or the index of its shards, with the component and the variant as groups.
WEIGHTS_PATTERN = re.compile(
    rf"(\w+)/\w+{SHARD_PATTERN}(?:\.(\w+))?{SHARD_PATTERN}\.(?:safetensors|bin)"
    r"(?:\.index(?:\.(\w+))?\.json)?"
)
# Beside the components.
PIPELINE_SETTINGS = ("caption_length", "caption_dropout", "simplify_captions", "w")
PRIVATE_KEY = "_text_to_image"  # diffusers ignores keys with a leading underscore
STABLE_DIFFUSION_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}
STABLE_DIFFUSION_W = 6.5  # 1 + w is 7.5, the default of Stable Diffusion's own pipeline
# Keys by which the libraries remember where on this machine a part was loaded from.
LOCAL_KEYS = ("_name_or_path", "is_local", "local_files_only")
DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
PUSH_OPTIONS = ("repo_id", "commit_message", "private", "token", "create_pr")
MODEL_TAGS = ["text-to-image", "diffusion", "ddpm", "classifier-free-guidance"]
USAGE = """\
```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({model!r}, trust_remote_code=True, use_safetensors=True)
image = pipe({prompt!r}, w={w:g}, seed=0).images[0]
```

w = 0 follows the prompt without guidance; w = -1 ignores it. `trust_remote_code` runs `pipeline.py`
and the files that it imports: read them first. The parts load without it. All stock schedulers but
EDM's fit once the pipeline is loaded (PNDM, KDPM2 and the ancestral ones only where the network
predicts epsilon or v):

```python
from diffusers import DDIMScheduler, UNet2DConditionModel

pipe.scheduler = DDIMScheduler.from_pretrained({model!r}, subfolder="scheduler")
unet = UNet2DConditionModel.from_pretrained({model!r}, subfolder="unet", use_safetensors=True)
```
"""
USAGE_STOCK = """\
```python
from diffusers import DiffusionPipeline

# diffusers' StableDiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({model!r}, use_safetensors=True)
image = pipe({prompt!r}, guidance_scale={s:g}).images[0]
```

`pipeline.py` in this repository, once you have read it, adds w = guidance_scale - 1 and a seed:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(
    {model!r}, custom_pipeline={model!r}, trust_remote_code=True, use_safetensors=True)
image = pipe({prompt!r}, w={w:g}, seed=0).images[0]
```
"""


class HubFormat(Base):
    """Saving and loading for a DiffusionPipeline; name it first among the bases of a class."""

    # What decides what may be loaded (pipeline/models/trusted.py). pipeline/models/loading.py
    # registers it when it is imported; in a copy of this file that came with a model it stays None.
    trusted: ClassVar[ModuleType | None] = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Any:
        """Load `user/name`, `user/name@revision` or a folder, by the classes of this package.

        Code that was saved with the model never runs; a model that needs it is refused. Without
        this package diffusers' own loading applies, which runs a repository's code once it is
        trusted.
        """
        name = folder = pretrained_model_name_or_path
        if cls.trusted is not None and not os.path.isdir(folder):
            options = {key: kwargs.pop(key) for key in DOWNLOAD_OPTIONS if key in kwargs}
            folder = cls.trusted.download_model(str(name), kwargs.get("variant"), **options)
        pipe = super().from_pretrained(folder, **kwargs)
        pipe.register_to_config(_name_or_path=str(name))  # instead of the cache's folder
        if cls.trusted is not None and cls.trusted.is_stable_diffusion_folder(Path(folder)):
            # Stable Diffusion's own pipeline overrides these two as well, whatever was saved.
            settings = pipe.scheduler.config
            fixes: dict[str, Any] = {"clip_sample": False} if settings.get("clip_sample") else {}
            leading = settings.get("timestep_spacing") == "leading"
            if leading and settings.get("steps_offset", 1) != 1:
                fixes["steps_offset"] = 1
            pipe.scheduler.register_to_config(**fixes)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """Build the pipeline from the parts of another one, whose default guidance it keeps."""
        # `_w` is left by one of our pipelines that a stock pipeline was built from.
        if not {"w", "_w"} & pipeline.config.keys():
            kwargs.setdefault("w", STABLE_DIFFUSION_W)
        for name in ("vae", "whitening"):  # diffusers drops classes that it does not know
            part = getattr(pipeline, name, None)
            if part is not None:
                kwargs.setdefault(name, part)
        return super().from_pipe(pipeline, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read our settings from a Stable Diffusion index too, which diffusers does not."""
        if config_dict.get("_class_name") == STABLE_DIFFUSION_INDEX["_class_name"]:
            private = config_dict.get(PRIVATE_KEY, {})
            settings = {name: private[name] for name in PIPELINE_SETTINGS if name in private}
            config_dict = {"w": STABLE_DIFFUSION_W} | settings | config_dict
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a saved index; within this package its own classes replace saved code."""
        index = super().load_config(*args, **kwargs)
        if cls.trusted is not None and isinstance(index, dict):
            return cls.trusted.validate_index(index)
        return index

    def to_json_string(self) -> str:
        """Return `model_index.json`: Stable Diffusion's, or ours with our classes' files."""
        index = without_local_keys(json.loads(super().to_json_string()))
        for name, module in self._own_modules().items():
            index[name] = [module.rpartition(".")[2], index[name][1]]
        index["_class_name"] = [PIPELINE_FILE, type(self).__name__]
        if self.is_stable_diffusion():
            stock = ("_diffusers_version", "unet", "vae", "text_encoder", "tokenizer")
            private = {key: value for key, value in index.items() if key not in stock}
            index = {key: index[key] for key in stock} | STABLE_DIFFUSION_INDEX
            index["scheduler"] = ["diffusers", private["scheduler"][1]]
            index[PRIVATE_KEY] = private
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write the index and the code that it names; remove local paths from the components."""
        folder = Path(save_directory)
        for path, source in self._code().items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / path)
        for name in self.components:
            for path in (folder / name / "config.json", folder / name / "tokenizer_config.json"):
                settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
                if settings.keys() & set(LOCAL_KEYS):
                    settings = without_local_keys(settings)
                    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
                    path.write_text(text + "\n", encoding="utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the pipeline in a folder, and with push_to_hub on the Hub too, as diffusers does."""
        options = {key: kwargs.pop(key) for key in PUSH_OPTIONS if key in kwargs}
        weights: dict[str, Any] = {
            "safe_serialization": safe_serialization,
            "variant": variant,
            "max_shard_size": max_shard_size,
        }
        super().save_pretrained(save_directory, **weights, **kwargs)
        if push_to_hub:
            self.push_to_hub(**{"repo_id": Path(save_directory).name} | options, **weights)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> CommitInfo:
        """Upload the complete pipeline in one commit, with a card where the repository has none.

        repo_id: `user/name`, or `name` for your own. variant, max_shard_size: as in
        `save_pretrained`. ValueError for a pipeline that other users could not load: pickled
        weights, or no text encoder.
        """
        if not safe_serialization:
            raise ValueError("A pickle may run code. Push with safe_serialization=True.")
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "This pipeline has no text encoder, so nobody could use it. Load it with "
                "pipeline.load_pipeline, which adds the one that its config.yaml names."
            )
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
            if not api.file_exists(repo_id, "README.md"):
                card = default_card(repo_id, self.is_stable_diffusion(), self.config["w"], variant)
                card.save(folder / "README.md")
            return api.create_commit(
                repo_id,
                commit_operations(api, repo_id, folder),
                create_pr=create_pr,
                commit_message=commit_message or f"Upload {type(self).__name__}",
            )

    def is_stable_diffusion(self) -> bool:
        """Whether diffusers' StableDiffusionPipeline generates the same images from these parts."""
        unet, vae, tokenizer, scheduler = self.unet, self.vae, self.tokenizer, self.scheduler
        if scheduler is None or tokenizer is None or self.whitening is not None:
            return False
        if not (
            isinstance(unet, UNet2DConditionModel)
            and isinstance(vae, AutoencoderKL)
            and isinstance(self.text_encoder, CLIPTextModel)
        ):
            return False
        settings = scheduler.config
        if "scheduler" in self._own_modules():
            if type(scheduler).__name__ != "DDPMScheduler":
                return False
            # diffusers' scheduler adds this noise to the last step too.
            if str(settings.get("variance_type")).startswith("fixed_large"):
                return False
        # StableDiffusionPipeline sets clip_sample to False and steps_offset to 1, whatever they
        # are.
        if settings.get("clip_sample"):
            return False
        if settings.get("timestep_spacing") == "leading" and settings.get("steps_offset", 1) != 1:
            return False
        return (
            unet.config["addition_embed_type"] is None
            and unet.config["class_embed_type"] is None
            and unet.config["time_cond_proj_dim"] is None
            and not vae.config["shift_factor"]
            and not self.config["simplify_captions"]
            and self.config["caption_length"] in (None, tokenizer.model_max_length)
        )

    def _own_modules(self) -> dict[str, str]:
        """The module of each component that the libraries do not have."""
        modules: dict[str, str] = {}
        for name, part in self.components.items():
            part = getattr(part, "_orig_mod", part)  # what torch.compile has wrapped
            module = type(part).__module__
            if part is not None and module.split(".")[0] not in LIBRARIES:
                modules[name] = module
        return modules

    def _code(self) -> dict[str, Path]:
        """Return source files by path in the saved folder; ValueError for a class in no file."""
        modules = self._own_modules()
        for name, module in modules.items():
            if module == "__main__":
                raise ValueError(
                    f"{name} is the class {type(getattr(self, name)).__name__} of the running "
                    "script, which cannot be saved. Move it to a file of its own."
                )
        source = Path(inspect.getfile(type(self)))
        code = {f"{PIPELINE_FILE}.py": source}
        for name in get_relative_imports(source):
            code[f"{name}.py"] = source.with_name(f"{name}.py")
        if not self.is_stable_diffusion():
            for name, module in modules.items():
                file = inspect.getfile(sys.modules[module])
                code[f"{name}/{module.rpartition('.')[2]}.py"] = Path(file)
        return code


def without_local_keys(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without LOCAL_KEYS."""
    return {key: value for key, value in settings.items() if key not in LOCAL_KEYS}


def parse_weights_file(name: str) -> tuple[str, str | None] | None:
    """(component, variant) of a file of weights or an index of shards, None for other files."""
    found = WEIGHTS_PATTERN.fullmatch(name)
    return (found[1], found[2] or found[3]) if found else None


def commit_operations(
    api: HfApi, repo_id: str, folder: Path, kind: str = "model"
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Return the operations that upload a folder and delete earlier weights it replaces.

    Earlier weights would be loaded instead of the new ones. All other files stay.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    weights = {parse_weights_file(name) for name in files} - {None}
    existing = api.list_repo_files(repo_id, repo_type=kind) if weights else []
    stale = [name for name in existing if name not in files and parse_weights_file(name) in weights]
    additions = [CommitOperationAdd(name, path) for name, path in files.items()]
    return [*additions, *(CommitOperationDelete(name) for name in stale)]


def default_card(repo_id: str, stock: bool, w: float, variant: str | None = None) -> ModelCard:
    """A model card that only shows how to use the repository, at w."""
    data = ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=MODEL_TAGS)
    usage = usage_snippet(repo_id, stock, "a cat", w, variant)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {repo_id.rpartition('/')[2]}\n\n{usage}")


def usage_snippet(
    model: str, stock: bool, prompt: str, w: float, variant: str | None = None
) -> str:
    """Markdown that shows how to use a saved model, a folder or a repository, without this package.

    stock: whether its index is Stable Diffusion's. variant: that of its weights, such as fp16; None
    for plain ones.
    """
    text = (USAGE_STOCK if stock else USAGE).format(model=model, prompt=prompt, w=w, s=1 + w)
    if variant is None:
        return text
    return text.replace("use_safetensors=True)", f"use_safetensors=True, variant={variant!r})")
