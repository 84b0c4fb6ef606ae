"""The call of the pipeline: diffusers' conformance (P2-P8, P12, P20-P23, P27)."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import is_torchsde_available
from generation import (
    assert_close,
    generate,
)
from tiny import WIDTH, tiny_pipeline

from pipeline import TextToImagePipeline
from pipeline.diffusion.captions import CaptionWhitening
from pipeline.diffusion.guidance import InputError
from pipeline.diffusion.scheduler import DDPMScheduler


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, (8, 8, 3)),
        ({"patch_size": 4}, (32, 32, 3)),
        ({"sample_size": (8, 16)}, (8, 16, 3)),
        ({"kind": "clip", "text": False}, (8, 8, 3)),
    ],
)
def test_call_returns_images_of_the_models_size(settings, shape):
    assert generate(tiny_pipeline(**settings))[0].shape == shape


def test_call_has_diffusers_signature():
    call = inspect.signature(TextToImagePipeline.__call__).parameters
    required = {
        "prompt",
        "height",
        "width",
        "guidance_scale",
        "negative_prompt",
        "prompt_embeds",
        "negative_prompt_embeds",
        "cross_attention_kwargs",
    }
    optional = {
        "num_inference_steps",
        "num_images_per_prompt",
        "generator",
        "latents",
        "output_type",
        "return_dict",
    }
    assert required | optional <= set(call)
    assert all(call[name].default is not inspect.Parameter.empty for name in optional)


def test_call_batches_prompts_of_unequal_length(pipe):
    prompts = ["red heart", "a red cat face", 100 * "very long "]
    own = [torch.Generator().manual_seed(i) for i in range(3)]
    assert len(generate(pipe, prompts, generator=own)) == 3


@pytest.mark.parametrize("w", [0.0, 2.0])
def test_call_in_a_batch_equals_the_image_alone(pipe, w):
    prompts = ["red heart", "a red cat face", ""]
    batch = generate(pipe, prompts, seed=5, w=w)
    for i, prompt in enumerate(prompts):
        assert_close(batch[i], generate(pipe, prompt, seed=5 + i, w=w)[0])


def test_call_returns_the_same_tuple_and_output(pipe):
    assert np.array_equal(generate(pipe, return_dict=False), generate(pipe, return_dict=True))


def test_components_are_those_of_the_constructor(pipe):
    assert set(pipe.components) == {
        "unet",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "vae",
        "whitening",
    }
    arguments = set(inspect.signature(TextToImagePipeline.__init__).parameters) - {"self"}
    assert set(pipe.components) | set(pipe.parameters) == arguments


@pytest.mark.parametrize(
    ("dtype", "off"), [(torch.float64, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]
)
def test_to_dtype_generates_the_same_image(dtype, off):
    pipe = tiny_pipeline(patch_size=2)
    reference = generate(pipe, w=2.0, eta=0)
    pipe.to(dtype)
    assert all(
        part.dtype == dtype
        for part in pipe.components.values()
        if isinstance(part, torch.nn.Module)
    )
    images = generate(pipe, w=2.0, eta=0)
    assert np.isfinite(images).all()
    assert np.abs(images - reference).mean() < off
    assert generate(pipe, output_type="latent").dtype == torch.promote_types(dtype, torch.float32)


def test_call_with_layerwise_casting_is_finite(pipe):
    pipe.unet.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    assert np.isfinite(generate(pipe, w=2.0)).all()
    assert pipe.unet.conv_in.weight.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("prompt", ["red heart", ["red heart", "cat"]])
@pytest.mark.parametrize("n", [1, 2])
def test_call_repeats_num_images_per_prompt(pipe, prompt, n):
    prompts = [prompt] if isinstance(prompt, str) else prompt
    images = generate(pipe, prompt, num_images_per_prompt=n, w=1.0)
    assert len(images) == n * len(prompts)
    for i, image in enumerate(images):
        assert_close(image, generate(pipe, prompts[i // n], seed=i, w=1.0)[0])


def test_call_output_types_hold_the_same_image(pipe):
    as_np, as_pt, as_pil = (generate(pipe, output_type=kind)[0] for kind in ("np", "pt", "pil"))
    assert_close(as_pt.permute(1, 2, 0), as_np)
    assert_close(np.asarray(as_pil) / 255, as_np, atol=2 / 255)
    x = generate(pipe, output_type="latent")
    assert_close((x[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1), as_np)


@pytest.mark.parametrize("name", [kind.name for kind in KarrasDiffusionSchedulers])
def test_call_works_with_every_stock_scheduler(pipe, name):
    if name == "DPMSolverSDEScheduler" and not is_torchsde_available():
        pytest.skip("it needs torchsde")
    pipe.scheduler.register_to_config(skip_prk_steps=True)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    images = generate(
        pipe, ["red heart", "cat"], num_inference_steps=5 if "KDPM2" in name else 2, w=1.0
    )
    assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all()


def test_call_with_stock_ddim_matches_ours_at_eta_zero(pipe):
    """By default it takes the noise from the x_0 before clipping, which leaves halos."""
    pipe.scheduler = DDPMScheduler(
        beta_schedule="sigmoid", prediction_type="sample", timestep_spacing="trailing"
    )
    ours = generate(pipe, w=4.0, num_inference_steps=8, eta=0)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert_close(generate(pipe, w=4.0, num_inference_steps=8), ours)


@pytest.mark.parametrize("size", [1, 2])
def test_call_with_attention_slicing_is_unchanged(pipe, size):
    reference = generate(pipe, w=1.0)
    pipe.enable_attention_slicing(size)
    assert_close(generate(pipe, w=1.0), reference, atol=1e-3)


def test_call_with_offloaded_whitening_is_unchanged():
    """It has buffers alone, and accelerate's hooks ask each part for a parameter."""
    pipe = tiny_pipeline(w=1.0)
    pipe.register_modules(whitening=CaptionWhitening(WIDTH))
    expected = generate(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(generate(pipe), expected) and np.array_equal(generate(pipe), expected)


def test_call_takes_height_and_width():
    pipe = tiny_pipeline(patch_size=4, sample_size=(8, 16))
    assert generate(pipe)[0].shape == (32, 64, 3)
    assert generate(pipe, height=64, width=32)[0].shape == (64, 32, 3)
    with pytest.raises(InputError, match="height .*4.* 30"):
        generate(pipe, height=30)
