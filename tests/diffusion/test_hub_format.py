"""What a saved pipeline holds: index, code, and operations of a push."""

import json

import pytest
from diffusers import AutoencoderTiny, DDIMScheduler
from generation import stable_diffusion
from tiny import WIDTH, tiny_pipeline

from pipeline import TextToImagePipeline
from pipeline.diffusion.captions import CaptionWhitening
from pipeline.diffusion.hub_format import parse_weights_file, usage_snippet
from pipeline.diffusion.scheduler import DDPMScheduler

# Byte for byte what earlier versions saved, which other users' copies of the code have to load.
OWN_INDEX = {
    "_class_name": ["pipeline", "TextToImagePipeline"],
    "caption_dropout": 0.1,
    "caption_length": 8,
    "scheduler": ["scheduler", "DDPMScheduler"],
    "text_encoder": ["transformers", "BertModel"],
    "tokenizer": ["transformers", "BertTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["patches", "PatchAutoencoder"],
    "simplify_captions": False,
    "w": 1.5,
    "whitening": ["captions", "CaptionWhitening"],
}
STOCK_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_text_to_image": {
        "_class_name": ["pipeline", "TextToImagePipeline"],
        "caption_dropout": None,
        "caption_length": None,
        "scheduler": ["scheduler", "DDPMScheduler"],
        "simplify_captions": False,
        "w": 2.0,
        "whitening": [None, None],
    },
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def own_pipeline():
    pipe = tiny_pipeline(patch_size=2, w=1.5, caption_length=8, caption_dropout=0.1)
    pipe.register_modules(whitening=CaptionWhitening(WIDTH))
    return pipe


def stock_pipeline(**scheduler):
    """A pipeline that Stable Diffusion's own can replace, unless `scheduler` has other settings."""
    pipe = TextToImagePipeline.from_pipe(stable_diffusion(), w=2.0)
    settings = {"clip_sample": False, "steps_offset": 1} | scheduler
    return TextToImagePipeline(**pipe.components | {"scheduler": DDPMScheduler(**settings)}, w=2.0)


@pytest.mark.parametrize(
    ("pipe", "expected"), [(own_pipeline, OWN_INDEX), (stock_pipeline, STOCK_INDEX)]
)
def test_to_json_string_is_byte_identical(pipe, expected, tmp_path):
    pipe().save_pretrained(tmp_path)
    text = (tmp_path / "model_index.json").read_text(encoding="utf-8")
    version = {"_diffusers_version": json.loads(text)["_diffusers_version"]}
    assert text == json.dumps(version | expected, indent=2, sort_keys=True) + "\n"


def test_save_config_writes_the_code_that_the_index_names(tmp_path):
    own_pipeline().save_pretrained(tmp_path)
    code = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.py")}
    beside = {"pipeline.py", "captions.py", "guidance.py", "hub_format.py"}
    assert code == beside | {"scheduler/scheduler.py", "vae/patches.py", "whitening/captions.py"}


def test_save_config_removes_local_paths(tmp_path):
    pipe = own_pipeline()
    pipe.unet.register_to_config(_name_or_path="/Volumes/someone/unet")
    pipe.save_pretrained(tmp_path)
    assert "_name_or_path" not in json.loads((tmp_path / "unet" / "config.json").read_text())


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_sample": True},
        {"steps_offset": 0},
        {"variance_type": "fixed_large"},
    ],
    ids=str,
)
def test_is_stable_diffusion_needs_its_scheduler_settings(settings):
    assert stock_pipeline().is_stable_diffusion()
    assert not stock_pipeline(**settings).is_stable_diffusion()


def test_is_stable_diffusion_needs_its_components():
    changes = [
        {"vae": AutoencoderTiny()},
        {"whitening": CaptionWhitening(WIDTH)},
        {"tokenizer": None},
        {"scheduler": None},
    ]
    for change in changes:
        pipe = stock_pipeline()
        pipe.register_modules(**change)
        assert not pipe.is_stable_diffusion(), change
    pipe = stock_pipeline()
    pipe.register_modules(scheduler=DDIMScheduler(clip_sample=False, steps_offset=1))
    assert pipe.is_stable_diffusion()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unet/diffusion_pytorch_model.safetensors", ("unet", None)),
        ("unet/diffusion_pytorch_model.fp16.safetensors", ("unet", "fp16")),
        ("unet/diffusion_pytorch_model-00001-of-00002.bin", ("unet", None)),
        ("unet/diffusion_pytorch_model.safetensors.index.fp16.json", ("unet", "fp16")),
        ("text_encoder/model.fp16-00001-of-00002.safetensors", ("text_encoder", "fp16")),
        ("unet/config.json", None),
        ("README.md", None),
    ],
)
def test_parse_weights_file_finds_component_and_variant(name, expected):
    assert parse_weights_file(name) == expected


def test_push_to_hub_refuses_what_others_could_not_load():
    with pytest.raises(ValueError, match="safe_serialization"):
        tiny_pipeline().push_to_hub("user/name", safe_serialization=False)
    pipe = tiny_pipeline()
    pipe.register_modules(text_encoder=None)
    with pytest.raises(ValueError, match="text encoder"):
        pipe.push_to_hub("user/name")


def test_usage_snippet_names_the_variant_in_every_load():
    for stock in (True, False):
        plain = usage_snippet("user/name", stock, "a cat", 2.0)
        fp16 = usage_snippet("user/name", stock, "a cat", 2.0, "fp16")
        assert "variant" not in plain
        assert fp16.count("variant='fp16'") == plain.count("use_safetensors=True)") == 2
