"""Someone with diffusers alone loads, samples, forks and pushes again what was pushed."""

import json
import re

import diffusers
import numpy as np
import pytest
import torch
from hub_world import Process, assert_same_images, commit_count, python_blocks
from huggingface_hub import ModelCard
from tiny import tiny_pipeline

from pipeline.config import Config, HubConfig
from pipeline.diffusion import hub_format
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.models import loading


def test_from_pretrained_needs_trust_and_samples_the_same(outsider, expected):
    outsider("assert 'trust_remote_code' in refusal and untrusted == []")
    outsider("assert type(pipe.scheduler).__module__.startswith('diffusers_modules')")
    assert_same_images(outsider.images(), expected)


def test_components_load_as_stock_classes_without_code(outsider, pushed):
    outsider(f"""
for name in ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"):
    scheduler = getattr(diffusers, name).from_pretrained({pushed!r}, subfolder="scheduler")
    assert scheduler.config.timestep_spacing == "trailing"
    assert scheduler.config.num_train_timesteps == 1000
diffusers.UNet2DConditionModel.from_pretrained({pushed!r}, subfolder="unet", use_safetensors=True)
own = pipe.scheduler
pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
pipe("red heart", num_inference_steps=2)
pipe.scheduler = own""")


def test_usage_of_the_card_runs(hub, outsider, pushed):
    blocks = python_blocks(hub.files("models", pushed)["README.md"].decode())
    assert len(blocks) == 2
    outsider("original = pipe")
    try:
        outsider("\n".join(blocks) + "\nassert image.size == (16, 16)")
    finally:
        outsider("pipe = original")


def test_usage_names_the_schedulers_that_sample():
    usage = hub_format.usage_snippet("a/b", False, "cat", 1.0)
    sentence = re.search(r"stock schedulers .*?:", usage, re.S)[0]
    own = DDPMScheduler(
        num_train_timesteps=100, beta_end=0.2, prediction_type="sample", timestep_spacing="trailing"
    )
    pipe = tiny_pipeline()
    refused = set()
    for name in set(own._compatibles) - {"DPMSolverSDEScheduler"}:  # which needs torchsde
        pipe.scheduler = getattr(diffusers, name).from_config(own.config)
        try:
            pipe("red heart", num_inference_steps=2)
        except (ValueError, NotImplementedError):
            refused.add(name)
    named = {
        "EDM's": {"EDMEulerScheduler"},
        "PNDM": {"PNDMScheduler"},
        "KDPM2": {"KDPM2DiscreteScheduler"},
        "ancestral": {"EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"},
    }
    assert refused == set().union(*(kinds for word, kinds in named.items() if word in sentence))


@pytest.mark.slow
def test_push_to_hub_of_a_loaded_pipeline_loads_again(hub, place, outsider, pushed, expected):
    outsider("pipe.push_to_hub('tester/fork')")
    original = hub.files("models", pushed)
    fork = hub.files("models", "tester/fork")
    assert {"pipeline.py", "guidance.py", "hub_format.py", "vae/patches.py"} < fork.keys()
    changed = {path for path, content in fork.items() if original[path] != content}
    # A tokenizer's files remember how it last padded.
    assert changed <= {"README.md", "tokenizer/tokenizer.json"}
    card = fork["README.md"].decode()
    assert ModelCard(card).data.library_name == "diffusers"
    assert "pipe('a cat', w=1, seed=0)" in card, "its own w, and no prompt that it may not know"
    other = Process(hub.env(place / "other-home"), place / "other", "-P")
    other("import numpy as np\nfrom diffusers import DiffusionPipeline")
    other("pipe = DiffusionPipeline.from_pretrained('tester/fork', trust_remote_code=True)")
    assert_same_images(other.images(), expected)
    other("pipe.push_to_hub('tester/fork')")
    other("pipe.save_pretrained('saved', push_to_hub=True, repo_id='tester/fork')")
    other.close()
    assert commit_count(hub, "tester/fork") == 2, "the second push changed nothing"
    loading.load_from_folder(place / "other" / "saved")


def test_from_pretrained_fails_where_the_docs_say_so(hub, outsider, pushed):
    hub.add("tester/offline", hub.files("models", pushed))
    outsider(f"""
from huggingface_hub import constants, snapshot_download
def outcome(model, **options):
    try:
        pipe = DiffusionPipeline.from_pretrained(model, trust_remote_code=True, **options)
    except Exception as error:
        return type(error).__name__
    return type(pipe).__name__
assert outcome({pushed!r}, scheduler=diffusers.DDIMScheduler()) == "ValueError"
def offline_outcome(model, load=outcome):
    constants.HF_HUB_OFFLINE = True
    try:
        return load(model)
    except Exception as error:
        return type(error).__name__
    finally:
        constants.HF_HUB_OFFLINE = False
name = "tester/offline"
assert outcome(name) == "TextToImagePipeline"
assert offline_outcome(name) == "OfflineModeIsEnabled"
assert offline_outcome(name, snapshot_download) == "IncompleteSnapshotError"
folder = snapshot_download(name)
assert offline_outcome(folder) == "TextToImagePipeline"
assert offline_outcome(name, snapshot_download) == folder""")


def test_from_pretrained_cannot_import_names_with_a_dot(hub, outsider, pushed):
    hub.add("tester/tiny.two", hub.files("models", pushed))
    output = outsider(
        "try:\n    DiffusionPipeline.from_pretrained('tester/tiny.two', trust_remote_code=True)\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    assert "ModuleNotFoundError" in output
    assert "diffusers_modules.local.tester--tiny" in output
    (problem,) = Config(hub=HubConfig("tester/tiny.two")).problems()
    assert problem.startswith("hub.repo_id must")
    assert "'tester/tiny.two'" in problem and "'tester/tiny-two'" in problem


# ---- Stable Diffusion's components


def test_is_stable_diffusion_needs_its_scheduler_settings(stable, place):
    pipe = loading.load_from_folder(place / "stable")
    scheduler = pipe.scheduler
    assert pipe.is_stable_diffusion()
    # Stock diffusers changes the first two, and adds other noise for the third.
    for other in ({"clip_sample": True}, {"steps_offset": 0}, {"variance_type": "fixed_large"}):
        pipe.scheduler = DDPMScheduler.from_config(scheduler.config, **other)
        assert not pipe.is_stable_diffusion()
    pixels = tiny_pipeline("clip", text=False)
    assert not pixels.is_stable_diffusion()
    index = json.loads(pixels.to_json_string())
    assert index["_class_name"] == ["pipeline", "TextToImagePipeline"]


def test_stable_diffusion_loads_in_stock_diffusers_and_here(hub, stable, outsider, place):
    files = hub.files("models", stable)
    assert not [path for path in files if re.fullmatch(r".+/.+\.py", path)]
    card = files["README.md"].decode()
    assert "pipe('a cat', guidance_scale=4)" in card
    assert "pipe('a cat', w=3, seed=0)" in card
    request = (
        "'a cat', num_inference_steps=2, guidance_scale=2.0, output_type='np', "
        "generator=torch.Generator().manual_seed(0)"
    )
    outsider(f"""
def remote():
    return {{name for name in sys.modules if name.startswith("diffusers_modules")}}
before = remote()
stock = DiffusionPipeline.from_pretrained("tester/stable", use_safetensors=True)
assert before == remote(), "no remote code"
assert type(stock) is diffusers.StableDiffusionPipeline
assert type(stock.scheduler) is diffusers.DDPMScheduler
options = {{"custom_pipeline": "tester/stable", "trust_remote_code": True}}
ours = DiffusionPipeline.from_pretrained("tester/stable", **options)
assert type(ours).__name__ == "TextToImagePipeline" and ours.config.w == 3.0
for name, pipeline in (("stock", stock), ("ours", ours)):
    pipeline.set_progress_bar_config(disable=True)
    np.save(name + ".npy", pipeline({request}).images)""")
    stock, ours = (np.load(outsider.cwd / f"{name}.npy") for name in ("stock", "ours"))
    assert_same_images(stock, ours)
    pipe = loading.load_from_folder(place / "stable")
    assert type(pipe.scheduler) is DDPMScheduler and pipe.config.w == 3.0
    pipe.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="noise"):
        here = eval(f"pipe({request}).images", {"pipe": pipe, "torch": torch})
    assert_same_images(here, stock)
