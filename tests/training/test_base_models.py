"""Fine-tuning of whole models: what trains, what is saved, who can load it, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from finetuning import ours, quiet, sample, stable_diffusion, stock
from safetensors.torch import load_file
from tiny import tiny_pipeline
from training_runs import UNET_FILE, check_refused, same, train, weights

from pipeline.config import DEFAULT, DiffusionConfig, load
from pipeline.models import build, loading
from pipeline.training.task import TrainingTask


def test_load_pipeline_matches_stable_diffusion(base):
    assert np.abs(sample(ours(base)) - sample(stock(base))).max() < 1e-4
    assert loading.load_pipeline(base).guidance_scale == 7.5


def test_train_leaves_what_stock_diffusers_loads(tuning, base, tmp_path):
    train(tuning, tmp_path)
    run = tmp_path / "tuned"
    before, after = load_file(base / UNET_FILE), weights(run)
    assert before.keys() == after.keys()
    convolutions = [name for name in before if "conv1.weight" in name]
    assert not any(torch.equal(before[name], after[name]) for name in convolutions)
    theirs = sample(stock(run / "pipeline"))
    assert np.abs(theirs - sample(ours(run))).max() < 1e-4
    assert np.abs(theirs - sample(stock(base))).max() > 1e-3


def test_build_scheduler_does_not_clip_latents(tmp_path):
    """A DDIMScheduler without settings clips to [-1, 1] and takes no offset; both are changed."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    stable_diffusion(DDIMScheduler(**betas)).save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text()) | {"clip_sample": True, "steps_offset": 0}
    path.write_text(json.dumps(settings))
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    mine = loading.load_pipeline(str(tmp_path))
    np.testing.assert_allclose(sample(quiet(theirs)), sample(quiet(mine)), rtol=0, atol=1e-4)
    assert not build.build_scheduler(DiffusionConfig(), mine.scheduler).config.clip_sample
    assert mine.is_stable_diffusion()


def test_train_saves_the_scheduler_that_trained(tuning, tmp_path):
    """A base model's noise process, except for what the configuration names."""
    zero_snr = ("--diffusion.rescale_betas_zero_snr", "true")
    zero_snr += ("--diffusion.prediction_type", "v_prediction")
    done = train(tuning, tmp_path, *zero_snr, check=False)
    check_refused(done, "train.weighting", "velocity", "simple")
    more = ("--diffusion.timestep_spacing", "trailing", "--train.weighting", "velocity")
    train(tuning, tmp_path, *zero_snr, *more, "--train.steps", "1")
    folder = tmp_path / "tuned" / "pipeline"
    saved = DDPMScheduler.from_pretrained(folder, subfolder="scheduler").config
    assert saved.prediction_type == "v_prediction"
    assert saved.rescale_betas_zero_snr
    assert saved.timestep_spacing == "trailing"
    assert saved.beta_schedule == "scaled_linear"
    assert saved.beta_end == 0.012
    assert not saved.clip_sample


def test_gradient_checkpointing_gives_the_same_gradients(tuning, tmp_path):
    for name, flag in (("stored", "false"), ("recomputed", "true")):
        more = ("--train.gradient_checkpointing", flag)
        train(tuning, tmp_path / name, "--train.steps", "2", "--train.precision", "no", *more)
        config, _ = load(["--config", str(tuning), *more])
        unet = TrainingTask.build(config, torch.device("cpu")).unet
        assert unet.is_gradient_checkpointing == (flag == "true")
    a, b = weights(tmp_path / "stored" / "tuned"), weights(tmp_path / "recomputed" / "tuned")
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_train_tunes_our_own_format(tuning, tmp_path):
    """With its own caption length and patches."""
    folder = tmp_path / "own"
    tiny_pipeline(patch_size=2, caption_length=6, caption_dropout=0.1).save_pretrained(folder)
    more = ("--model.pretrained", str(folder), "--data.cache", str(tmp_path / "cache"))
    train(tuning, tmp_path, *more, "--train.steps", "2")
    tuned = loading.load_pipeline(tmp_path / "tuned")
    assert tuned.config.caption_length == 6
    assert type(tuned.vae).__name__ == "PatchAutoencoder"
    assert not same(tuned.unet.state_dict(), loading.load_pipeline(folder).unet.state_dict())


@pytest.mark.parametrize("name", ["sd15-lora", "sd15-full", "noto-lora"])
def test_dry_run_of_configs_on_tiny_base_models(name, edged, base, tmp_path):
    """Their own base models are not here."""
    own = tmp_path / "own"
    tiny_pipeline(patch_size=2, caption_length=8, caption_dropout=0.1).save_pretrained(own)
    settings = {
        "model.pretrained": own if name == "noto-lora" else base,
        "data.source": edged,
        "data.resolution": 16,
        "data.held_out": "null",
        "data.cache": tmp_path / "cache",
        "train.batch_size": 4,
        "train.threads": 1,
    }
    if name == "noto-lora":  # a tiny UNet has no shortcuts of other widths to adapt by name
        settings["lora.targets"] = "[conv1, to_q]"
    more = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    done = train(Path(DEFAULT).parent / f"{name}.yaml", tmp_path, *more, "--dry_run")
    assert "weights to train" in done.stdout
    assert "steps of 4 images" in done.stdout


@pytest.mark.parametrize(
    ("more", "values"),
    [
        (["--train.method", "lora", "--lora.targets", "[to_q, to_kk]"], ["lora.targets", "to_kk"]),
        (["--train.method", "lora", "--lora.targets", "[norm1]"], ["lora.targets", "norm1"]),
        (
            ["--train.method", "lora", "--diffusion.prediction_type", "sample"],
            ["diffusion.prediction_type"],
        ),
        (["--diffusion.rescale_betas_zero_snr", "true"], ["v_prediction", "epsilon"]),
        (["--sample.steps", "1000"], ["sample: ", "num_inference_steps", "1000"]),
        (["--data.resolution", "18"], ["data.resolution must be a multiple of 4", "18"]),
        (["--model.pretrained", "nowhere/at-all/x"], ["model.pretrained: nowhere/at-all/x"]),
        (["--model.channels", "[64, 64]"], ["model.channels"]),
        (["--lora.rank", "0", "--lora.alpha", "-1"], ["lora.rank", "lora.alpha"]),
    ],
)
def test_main_refuses_what_cannot_be_fine_tuned(tuning, tmp_path, more, values):
    check_refused(train(tuning, tmp_path / "bad", *more, check=False), *values)


def test_load_base_pipeline_refuses_an_adapter(tuning, adapted, tmp_path):
    done = train(tuning, tmp_path, "--model.pretrained", str(adapted), check=False)
    check_refused(done, "model.pretrained", adapted, "adapter")


def test_load_base_pipeline_refuses_an_inpainting_model(tuning, tmp_path):
    theirs = stable_diffusion()
    nine = type(theirs.unet).from_config(theirs.unet.config, in_channels=9)
    theirs.register_modules(unet=nine)
    theirs.save_pretrained(tmp_path / "inpaint")
    done = train(tuning, tmp_path, "--model.pretrained", str(tmp_path / "inpaint"), check=False)
    check_refused(done, "model.pretrained", tmp_path / "inpaint", "9 channels")


def test_load_base_pipeline_refuses_a_model_without_text(tuning, base, tmp_path):
    pipe = loading.load_pipeline(base)
    pipe.register_modules(text_encoder=None, tokenizer=None)
    pipe.save_pretrained(tmp_path / "mute")
    done = train(tuning, tmp_path, "--model.pretrained", str(tmp_path / "mute"), check=False)
    check_refused(done, "tokenizer", "text_encoder", tmp_path / "mute")
