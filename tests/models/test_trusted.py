"""An index may name known classes only, and a name is a path or a model on the Hub."""

import json
import re

import pytest

from pipeline.models import trusted
from pipeline.models.trusted import ModelError, VariantError

INDEX = {
    "_class_name": ["pipeline", "TextToImagePipeline"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["scheduler", "DDPMScheduler"],
}


def test_validate_index_resolves_our_classes():
    index = trusted.validate_index(INDEX | {"_private": 1, "feature_extractor": ["os", "system"]})
    assert index["scheduler"] == ["pipeline.diffusion.scheduler", "DDPMScheduler"]
    assert index.keys() == INDEX.keys()
    assert trusted.named_components(index) == ["unet", "scheduler"]


def test_validate_index_takes_stable_diffusion_with_our_settings():
    stock = INDEX | {"_class_name": "StableDiffusionPipeline"}
    assert trusted.validate_index(stock)["w"] == 6.5
    ours = {"_text_to_image": {"w": 2.0, "scheduler": ["scheduler", "DDPMScheduler"]}}
    assert trusted.validate_index(stock | ours)["w"] == 2.0


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"scheduler": ["my_scheduler", "MyScheduler"]}, "'MyScheduler' of 'my_scheduler'"),
        ({"scheduler": ["scheduler", "PatchAutoencoder"]}, "'PatchAutoencoder' of 'scheduler'"),
        ({"unet": ["os", "system"]}, "'system' of 'os'"),
        ({"unet": ["diffusers", "__name__"]}, "'__name__' of 'diffusers'"),
        ({"unet": ["diffusers", "DiffusionPipeline"]}, "'DiffusionPipeline' of 'diffusers'"),
        ({"unet": ["diffusers.utils", "load_image"]}, "'load_image' of 'diffusers.utils'"),
        ({"text_encoder": ["transformers", "pipeline"]}, "'pipeline' of 'transformers'"),
        ({"text_encoder": "transformers"}, "'transformers' of 'transformers'"),
        ({"unet": None}, "no unet"),
        ({"unet": None, "scheduler": None}, "no unet and no scheduler"),
        ({"_class_name": "FluxPipeline"}, "FluxPipeline"),
        ({"_class_name": []}, "[]"),
        ({"_class_name": None}, "None"),
        ({"w": "strong"}, "'strong'"),
        ({"_text_to_image": {"scheduler": ["os", "system"]}}, "'system' of 'os'"),
    ],
)
def test_validate_index_refuses_unknown_classes(change, culprit):
    with pytest.raises(ModelError, match=re.escape(culprit)):
        trusted.validate_index(INDEX | change)


@pytest.mark.parametrize(("text", "kind"), [("{", "corrupt"), ("[1]", "list")])
def test_read_json_refuses_what_is_no_object(text, kind, tmp_path):
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ModelError, match=f"{tmp_path}/model_index.json .*{kind}"):
        trusted.read_json(tmp_path / "model_index.json")


def test_parse_repo_id_prefers_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert trusted.parse_repo_id("runs/emoji") == ("runs/emoji", None)
    (tmp_path / "runs").mkdir()
    assert trusted.parse_repo_id("runs/emoji") is None
    assert trusted.parse_repo_id("runs/emoji@main") == ("runs/emoji", "main")
    assert trusted.parse_repo_id("a/b@refs/pr/1") == ("a/b", "refs/pr/1")


@pytest.mark.parametrize("name", ["/abs/path", "../x", "../x/y", "a/b/c", "a", "a/b@", "a/b@../c"])
def test_parse_repo_id_refuses_paths(name):
    assert trusted.parse_repo_id(name) is None


@pytest.mark.parametrize(
    ("name", "valid"),
    [("a/b", True), ("a-b/c.d_e", True), ("a", False), ("a/b--c", False), ("a/b c", False)],
)
def test_is_repo_id_follows_the_hub(name, valid):
    assert trusted.is_repo_id(name) is valid


def test_require_plain_weights_accepts_one_plain_file():
    plain = ["unet/a.fp16.safetensors", "unet/a.safetensors", "vae/a.safetensors"]
    trusted.require_plain_weights("m", plain)
    shards = ["unet/a.fp16-00001-of-00002.safetensors", "unet/a.fp16-00002-of-00002.safetensors"]
    with pytest.raises(VariantError, match="^m has only fp16 weights"):
        trusted.require_plain_weights("m", shards)


def test_require_safetensors_refuses_pickled_networks(tmp_path):
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
        (tmp_path / part / "model.bin").write_bytes(b"")
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    with pytest.raises(ModelError, match=f"{tmp_path} .*unet and vae"):
        trusted.require_safetensors(tmp_path, index)
    (tmp_path / "unet" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="^mine has no safetensors for its vae,"):
        trusted.require_safetensors(tmp_path, index, "mine")


def test_downloaded_files_leave_out_code_and_variants(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    (tmp_path / "unet").mkdir()
    for name in ("config.json", "a.safetensors", "a.fp16.safetensors", "a.bin", "code.py"):
        (tmp_path / "unet" / name).write_text("")
    (tmp_path / "pipeline.py").write_text("")
    names = {path.name for path in trusted.downloaded_files(tmp_path)}
    assert names == {"model_index.json", "config.json", "a.safetensors"}
