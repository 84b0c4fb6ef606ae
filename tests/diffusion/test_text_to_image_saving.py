"""Saving and loading of the pipeline (P1, P9, P10, P16, P18, P19)."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils import logging
from generation import assert_close, generate, stable_diffusion
from tiny import WIDTH, WORDS, tiny_pipeline

from pipeline import TextToImagePipeline
from pipeline.diffusion.autoencoder import ConvAutoencoder
from pipeline.diffusion.captions import CaptionWhitening
from pipeline.diffusion.scheduler import DDPMScheduler


@pytest.fixture
def diffusers_log(caplog):
    """diffusers' INFO messages."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_info()
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()
    logging.set_verbosity(verbosity)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("patch_size", [None, 2])
def test_from_pretrained_generates_the_same(tmp_path, safe, patch_size, diffusers_log):
    settings = {"w": 1.5, "caption_length": 8, "caption_dropout": 0.1, "simplify_captions": True}
    pipe = tiny_pipeline(patch_size=patch_size, **settings)
    pipe.save_pretrained(tmp_path, safe_serialization=safe)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(generate(again), generate(pipe))
    assert {name: again.config[name] for name in settings} == settings
    assert type(again.scheduler) is DDPMScheduler
    for name, component in pipe.components.items():
        assert component is None or name in diffusers_log.text


@pytest.mark.slow
def test_from_pretrained_works_in_a_fresh_process(tmp_path):
    parts = tiny_pipeline(patch_size=2).components
    TextToImagePipeline(**{**parts, "whitening": CaptionWhitening(WIDTH)}).save_pretrained(tmp_path)
    lines = (
        "import sys; from pipeline import TextToImagePipeline\n"
        "pipe = TextToImagePipeline.from_pretrained(sys.argv[1])\n"
        "print(type(pipe.vae).__name__, type(pipe.whitening).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", lines, tmp_path],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "PatchAutoencoder CaptionWhitening\n", done.stderr


def test_from_pretrained_keeps_a_trained_autoencoder(tmp_path):
    vae = ConvAutoencoder((3, 4, 8, 16), 1, 1, latent_channels=12).eval()
    parts = tiny_pipeline(patch_size=2, sample_size=2).components | {"vae": vae}
    pipe = TextToImagePipeline(**parts)
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "vae" / "autoencoder.py").is_file()
    again = TextToImagePipeline.from_pretrained(tmp_path)
    assert type(again.vae) is ConvAutoencoder
    for each in (pipe, again):
        each.set_progress_bar_config(disable=True)
    assert generate(pipe).shape[1:] == (16, 16, 3)
    assert_close(generate(again), generate(pipe))


def test_from_pretrained_keeps_whitening(tmp_path, pipe):
    states = torch.cat([pipe.encode_prompt(word)[0] for word in WORDS])
    white = TextToImagePipeline(
        **{**pipe.components, "whitening": CaptionWhitening.fit(states, 0.1)}
    )
    white.set_progress_bar_config(disable=True)
    assert torch.equal(white.encode_prompt("red")[0], white.whitening(pipe.encode_prompt("red")[0]))
    white.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(generate(again, w=1.0), generate(white, w=1.0))
    assert np.abs(generate(white, w=1.0) - generate(pipe, w=1.0)).max() > 1e-3


def test_from_pretrained_float16_generates_the_same(tmp_path):
    pipe = tiny_pipeline(patch_size=2).to(torch.float16)
    pipe.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path, dtype=torch.float16)
    again.set_progress_bar_config(disable=True)
    assert all(
        part.dtype == torch.float16
        for part in again.components.values()
        if isinstance(part, torch.nn.Module)
    )
    assert_close(generate(again, w=2.0), generate(pipe, w=2.0), atol=1e-2)


def test_from_pretrained_keeps_optional_parts_none(tmp_path):
    pipe = tiny_pipeline()
    states, empty = pipe.encode_prompt("red heart")
    bare = TextToImagePipeline(pipe.unet, pipe.scheduler)
    bare.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    assert (
        again.text_encoder is None
        and again.tokenizer is None
        and again.vae is None
        and again.whitening is None
    )
    assert_close(
        generate(again, None, prompt_embeds=states, negative_prompt_embeds=empty, w=1.0),
        generate(pipe, w=1.0),
    )


def test_save_pretrained_names_variants(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    again = TextToImagePipeline.from_pretrained(tmp_path, variant="fp16")
    for mine, theirs in zip(again.unet.parameters(), pipe.unet.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    pipe.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="variant=fp16"):
        TextToImagePipeline.from_pretrained(tmp_path / "plain", variant="fp16")


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_from_pretrained_takes_a_dtype_per_part(pipe, tmp_path, name):
    pipe.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(
        tmp_path, **{name: {"unet": torch.bfloat16, "default": torch.float32}}
    )
    assert (again.unet.dtype, again.text_encoder.dtype) == (torch.bfloat16, torch.float32)
    assert np.isfinite(generate(again)).all()


def test_from_pretrained_takes_a_device_map(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert_close(
        generate(TextToImagePipeline.from_pretrained(tmp_path, device_map="cpu")), generate(pipe)
    )


def test_save_pretrained_refuses_a_class_of_the_script(tmp_path, monkeypatch):
    class Mine(DDPMScheduler):
        pass

    pipe, incomplete = tiny_pipeline(), stable_diffusion()
    monkeypatch.setattr(Mine, "__module__", "__main__")
    pipe.scheduler = Mine()
    assert "Mine" in repr(pipe)
    with pytest.raises(ValueError, match="scheduler .*Mine"):
        pipe.save_pretrained(tmp_path)
    parts = incomplete.unet, None, incomplete.text_encoder, incomplete.tokenizer, incomplete.vae
    assert '"scheduler": [' in repr(TextToImagePipeline(*parts))
