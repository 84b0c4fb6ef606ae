"""Images of tiny pipelines in a few steps, and a tiny Stable Diffusion to compare with."""

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tiny import tiny_autoencoder, tiny_text, tiny_unet

STEPS = 3


def generate(pipe, prompt="red heart", **request):
    """Images (B, H, W, 3) in [0, 1], from seed 0 in a few steps unless requested otherwise."""
    request = {"seed": 0, "num_inference_steps": STEPS, "output_type": "np"} | request
    if "generator" in request:
        request["seed"] = None
    return pipe(prompt, **request)[0]


def generate_jointly(pipe, **request):
    """Images of two prompts from a single generator, diffusers' way."""
    request = {
        "num_inference_steps": STEPS,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(0),
    } | request
    return pipe(["a cat", "a dog"], **request)[0]


def rows_per_call(pipe, **request):
    """How many images the network was asked for in each of its calls."""
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda net, args: rows.append(len(args[0])))
    generate(pipe, **request)
    hook.remove()
    return rows


def assert_close(a, b, atol=1e-4):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def plan(scheduler, n):
    """The timesteps of n steps."""
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(n)
    return scheduler.timesteps


def stable_diffusion():
    """diffusers' own pipeline over tiny parts, with a real autoencoder and a stock scheduler."""
    tokenizer, encoder = tiny_text("clip")
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        tiny_autoencoder(),
        encoder,
        tokenizer,
        tiny_unet(4, text=False),
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
