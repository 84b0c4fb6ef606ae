"""How a pipeline is saved so that a stranger can load it: an index that diffusers follows, and the code it leads to.

This file travels with the pipeline, as guidance.py does, so that a stranger's own save and push keep the layout:

    model_index.json           "_class_name": ["pipeline", "TextToImagePipeline"], "scheduler": ["scheduler", "DDPMScheduler"]
    pipeline.py guidance.py hub_format.py               the pipeline, and the files beside it that it imports
    scheduler/scheduler.py vae/patches.py ...       each component that diffusers and transformers do not have
    scheduler/scheduler_config.json unet/ ...       as stock classes read them, without any of this code

Where Stable Diffusion's own pipeline draws the same from the same parts, the index is Stable Diffusion's, which stock
diffusers loads with no remote code at all. Ours then lies in it under `PRIVATE`, which diffusers does not read.
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
from typing import ClassVar

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

LIBRARIES = ("diffusers", "transformers")  # whose classes every stranger has
PIPELINE_FILE = "pipeline"  # the name that diffusers looks for
SHARD_PATTERN = r"(?:-\d+-of-\d+)?"
WEIGHTS_PATTERN = re.compile(
    rf"(\w+)/\w+{SHARD_PATTERN}(?:\.(\w+))?{SHARD_PATTERN}\.(?:safetensors|bin)(?:\.index(?:\.(\w+))?\.json)?"
)  # or their index
PIPELINE_SETTINGS = ("caption_length", "caption_dropout", "w")  # of ours, beside the components
PRIVATE_KEY = "_text_to_image"  # diffusers leaves out what begins with an underscore
STABLE_DIFFUSION_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}
LOCAL_KEYS = (
    "_name_or_path",
    "is_local",
    "local_files_only",
)  # where the libraries note that a part was loaded from
MODEL_TAGS = ["text-to-image", "diffusion", "ddpm", "classifier-free-guidance"]
USAGE = """\
```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({model!r}, trust_remote_code=True, use_safetensors=True)
image = pipe({prompt!r}, w={w:g}, seed=0).images[0]
```

w = 0 follows the prompt unguided, -1 ignores it. `trust_remote_code` runs `pipeline.py` and the files that it names: read
them first. The parts load without it, and stock schedulers but EDM's fit once the pipeline is there (PNDM, KDPM2 and the
ancestral ones only where the network predicts epsilon or v):

```python
from diffusers import DDIMScheduler, UNet2DConditionModel

pipe.scheduler = DDIMScheduler.from_pretrained({model!r}, subfolder="scheduler")
unet = UNet2DConditionModel.from_pretrained({model!r}, subfolder="unet", use_safetensors=True)
```
"""
USAGE_STOCK = """\
```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({model!r}, use_safetensors=True)  # diffusers' StableDiffusionPipeline
image = pipe({prompt!r}, guidance_scale={s:g}).images[0]
```

`pipeline.py` of this repository, once you have read it, adds w = guidance_scale - 1 and a seed for each picture:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({model!r}, custom_pipeline={model!r}, trust_remote_code=True, use_safetensors=True)
image = pipe({prompt!r}, w={w:g}, seed=0).images[0]
```
"""
STABLE_DIFFUSION_W = 6.5  # 1 + w is 7.5, what Stable Diffusion's own pipeline guides by
DOWNLOAD_OPTIONS = (
    "revision",
    "token",
    "cache_dir",
    "force_download",
    "local_files_only",
)  # options of loading that are a download's


class HubFormat:
    """The saving and loading of a DiffusionPipeline, to be named before it among the bases of a class."""

    # What decides what may be loaded (pipeline/models/trusted.py). pipeline/models/loading.py registers it when it is
    # imported; in a copy of this file that came with a model it stays None.
    trusted: ClassVar[ModuleType | None] = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """The pipeline saved in a folder, or in the Hub's `user/name` or `user/name@revision`, by the classes of this package.

        Nothing that was saved beside it is run, and what would need that is refused. In a process without this package it
        is diffusers' own loading, which runs the code of the repository once it is trusted to.
        """
        name = pretrained_model_name_or_path
        if cls.trusted is not None and not os.path.isdir(pretrained_model_name_or_path):
            options = {name: kwargs.pop(name) for name in DOWNLOAD_OPTIONS if name in kwargs}
            pretrained_model_name_or_path = cls.trusted.download_model(
                str(pretrained_model_name_or_path), kwargs.get("variant"), **options
            )
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        pipe.register_to_config(_name_or_path=str(name))  # and not where the cache keeps it
        if cls.trusted is not None and cls.trusted.is_stable_diffusion_folder(
            Path(pretrained_model_name_or_path)
        ):
            noise = (
                pipe.scheduler.config
            )  # of which its own pipeline keeps neither, whatever was saved
            mended = {"clip_sample": False} if noise.get("clip_sample") else {}
            if noise.get("timestep_spacing") == "leading" and noise.get("steps_offset", 1) != 1:
                mended["steps_offset"] = 1
            pipe.scheduler.register_to_config(**mended)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """The pipeline over the parts of another one, which guides by default as that one does; the rest is diffusers' own."""
        if not {"w", "_w"} & pipeline.config.keys():  # _w: of one of ours that it was made from
            kwargs.setdefault("w", STABLE_DIFFUSION_W)
        ours = {
            name: getattr(pipeline, name, None) for name in ("vae", "whitening")
        }  # diffusers drops classes it does not know
        return super().from_pipe(
            pipeline, **{name: part for name, part in ours.items() if part is not None} | kwargs
        )

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """diffusers' own, with what of ours lies in a Stable Diffusion index, which diffusers does not read."""
        if config_dict.get("_class_name") == STABLE_DIFFUSION_INDEX["_class_name"]:
            private = config_dict.get(PRIVATE_KEY, {})
            ours = {name: private[name] for name in PIPELINE_SETTINGS if name in private}
            config_dict = {"w": STABLE_DIFFUSION_W} | ours | config_dict
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """The index of a saved pipeline; in this package with its own classes in the place of those that came along."""
        index = super().load_config(*args, **kwargs)
        trusts = cls.trusted is not None and isinstance(index, dict)
        return cls.trusted.validate_index(index) if trusts else index

    def to_json_string(self) -> str:
        """`model_index.json`: our classes by the files that `save_config` writes, or Stable Diffusion's index, ours in it."""
        index = json.loads(super().to_json_string())
        index = {key: value for key, value in index.items() if key not in LOCAL_KEYS}
        for name, module in self._own_modules().items():
            index[name] = [module.rpartition(".")[2], index[name][1]]
        index["_class_name"] = [PIPELINE_FILE, type(self).__name__]
        if self.is_stable_diffusion():
            kept = ("_diffusers_version", "unet", "vae", "text_encoder", "tokenizer")
            ours = {key: value for key, value in index.items() if key not in kept}
            scheduler = ["diffusers", index["scheduler"][1]]
            index = (
                {key: index[key] for key in kept}
                | STABLE_DIFFUSION_INDEX
                | {"scheduler": scheduler, PRIVATE_KEY: ours}
            )
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs
    ) -> None:
        """The index, and beside it the code that it names; no file tells where on this machine a component came from."""
        folder = Path(save_directory)
        for path, source in self._code().items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / path)
        for path in (
            folder / name / file
            for name in self.components
            for file in ("config.json", "tokenizer_config.json")
        ):
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if found.keys() & set(LOCAL_KEYS):
                kept = {key: value for key, value in found.items() if key not in LOCAL_KEYS}
                path.write_text(
                    json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
                    encoding="utf-8",
                )
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """The pipeline in a folder, and with push_to_hub on the Hub too; the rest is diffusers' own."""
        known = ("repo_id", "commit_message", "private", "token", "create_pr")
        pushing = {name: kwargs.pop(name) for name in known if name in kwargs}
        weights = {
            "safe_serialization": safe_serialization,
            "variant": variant,
            "max_shard_size": max_shard_size,
        }
        super().save_pretrained(save_directory, **weights, **kwargs)
        if push_to_hub:
            self.push_to_hub(**{"repo_id": Path(save_directory).name} | pushing, **weights)

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
        """Upload the whole pipeline in one commit, with a short card where the repository has none; files as they are make none.

        repo_id: `user/name`, or `name` for one's own. variant, max_shard_size: as `save_pretrained` has them. ValueError where
        a stranger could not draw with what it would hold, pickled weights among it.
        """
        if not safe_serialization:
            raise ValueError(
                "safe_serialization is False, expected True in what is shared: a pickle may run code"
            )
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "this pipeline has no text encoder, expected one in what is shared: load it with pipeline.load_pipeline, "
                "which supplies the one that its config.yaml names"
            )
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
            if not api.file_exists(repo_id, "README.md"):
                default_card(repo_id, self.is_stable_diffusion(), self.config.w, variant).save(
                    Path(folder) / "README.md"
                )
            return api.create_commit(
                repo_id,
                commit_operations(api, repo_id, Path(folder)),
                create_pr=create_pr,
                commit_message=commit_message or f"Upload {type(self).__name__}",
            )

    def is_stable_diffusion(self) -> bool:
        """Whether diffusers' own StableDiffusionPipeline, given these parts, draws the same pictures."""
        unet, vae, tokenizer, scheduler = self.unet, self.vae, self.tokenizer, self.scheduler
        if scheduler is None or tokenizer is None or self.whitening is not None:
            return False
        if not (
            isinstance(unet, UNet2DConditionModel)
            and isinstance(vae, AutoencoderKL)
            and isinstance(self.text_encoder, CLIPTextModel)
        ):
            return False
        known = (
            "scheduler" not in self._own_modules() or type(scheduler).__name__ == "DDPMScheduler"
        )
        settings = scheduler.config  # StableDiffusionPipeline puts clip_sample to False and steps_offset to 1, whatever they are
        offset = (
            settings.get("steps_offset", 1) if settings.get("timestep_spacing") == "leading" else 1
        )
        ours = not str(settings.get("variance_type")).startswith(
            "fixed_large"
        )  # diffusers' adds such noise to the last step too
        kept = (
            not settings.get("clip_sample")
            and offset == 1
            and (ours or "scheduler" not in self._own_modules())
        )
        return (
            known
            and kept
            and unet.config.addition_embed_type is None
            and unet.config.class_embed_type is None
            and not vae.config.shift_factor
            and self.config.caption_length in (None, tokenizer.model_max_length)
        )

    def _own_modules(self) -> dict[str, str]:
        """The module of each component that the libraries do not have."""
        modules = {
            name: type(
                getattr(part, "_orig_mod", part)
            ).__module__  # _orig_mod: what torch.compile has wrapped
            for name, part in self.components.items()
            if part is not None
        }
        return {
            name: module
            for name, module in modules.items()
            if module.split(".")[0] not in LIBRARIES
        }

    def _code(self) -> dict[str, Path]:
        """Path in the saved folder -> source file, of all code that a stranger needs; ValueError for what is in no file."""
        for name, module in self._own_modules().items():
            if module == "__main__":
                raise ValueError(
                    f"{name} is a {type(getattr(self, name)).__name__} of the running script, expected a class of a "
                    "module: move it to a file of its own, which can travel"
                )
        source = Path(inspect.getsourcefile(type(self)))
        code = {f"{PIPELINE_FILE}.py": source} | {
            f"{name}.py": source.with_name(f"{name}.py") for name in get_relative_imports(source)
        }
        if not self.is_stable_diffusion():
            for name, module in self._own_modules().items():
                code[f"{name}/{module.rpartition('.')[2]}.py"] = Path(
                    inspect.getsourcefile(sys.modules[module])
                )
        return code


def parse_weights_file(name: str) -> tuple[str, str | None] | None:
    """(component, variant) where a file of a repository holds weights or says which files do, else None."""
    found = WEIGHTS_PATTERN.fullmatch(name)
    return found and (found[1], found[2] or found[3])


def commit_operations(
    api: HfApi, repo_id: str, folder: Path, kind: str = "model"
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What makes a repository hold a folder: every file under its own path, and no earlier weights of the same components and
    variants.

    Those would be loaded in the place of the new ones: an index of shards wherever there is one. All other files stay.
    """
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    kinds = set(filter(None, map(parse_weights_file, files)))
    there = api.list_repo_files(repo_id, repo_type=kind) if kinds else []
    stale = [name for name in there if name not in files and parse_weights_file(name) in kinds]
    return [CommitOperationAdd(*file) for file in files.items()] + [
        CommitOperationDelete(name) for name in stale
    ]


def default_card(repo_id: str, stock: bool, w: float, variant: str | None = None) -> ModelCard:
    """A model card that says no more than how to draw with the repository, at w."""
    data = ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=MODEL_TAGS)
    use = usage_snippet(repo_id, stock, "a cat", w, variant)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {repo_id.rpartition('/')[2]}\n\n{use}")


def usage_snippet(
    model: str, stock: bool, prompt: str, w: float, variant: str | None = None
) -> str:
    """How a process without this package draws with a saved model, a folder or a repository, as Markdown.

    stock: whether its index is Stable Diffusion's. variant: of its weights, such as fp16; None are plain ones.
    """
    text = (USAGE_STOCK if stock else USAGE).format(model=model, prompt=prompt, w=w, s=1 + w)
    return (
        text
        if variant is None
        else text.replace("use_safetensors=True)", f"use_safetensors=True, variant={variant!r})")
    )
