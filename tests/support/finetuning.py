"""Tiny base models of Stable Diffusion's format, and runs that fine-tune them."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from tiny import seeded, tiny_text, tiny_unet

from pipeline.config import DiffusionConfig
from pipeline.models import build, loading

FINETUNE = """
name: tuned
data: {source: SOURCE, held_out: null, resolution: 16, cache: CACHE}
model: {pretrained: BASE}
train: {steps: 4, batch_size: 4, lr: 1e-2, log_every: 1, validate_every: 2, save_every: 2, keep: 9,
        threads: 1, ema: 0.5}
sample: {prompts: [red, blue], w: [0, 1], steps: 2, every: 4}
"""
# Alpha is not the rank: the adapter's scale is 3.
LORA = (
    *("--train.method", "lora", "--lora.rank", "2", "--lora.alpha", "6"),
    *("--lora.targets", "[to_q, to_v, conv1, conv_shortcut, time_emb_proj]"),
)


def tiny_vae(kind="kl"):
    """Return an autoencoder of 16x16 images into 4 channels of 8x8."""
    if kind == "tiny":
        channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
        return seeded(lambda: AutoencoderTiny(**channels, **blocks))
    return seeded(
        lambda: AutoencoderKL(
            block_out_channels=(8, 16),
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.7,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
        )
    )


def stable_diffusion(scheduler=None):
    """Return a pipeline of diffusers' own with tiny components."""
    tokenizer, encoder = tiny_text("clip")
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = scheduler or PNDMScheduler(**betas, steps_offset=1, skip_prk_steps=True)
    network = tiny_unet(4, 8, text=False)
    parts = (tiny_vae(), encoder, tokenizer, network, scheduler, None, None)
    return quiet(StableDiffusionPipeline(*parts, requires_safety_checker=False))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(base, adapter=None):
    """Return diffusers' own pipeline of a folder, with an adapter."""
    pipe = quiet(StableDiffusionPipeline.from_pretrained(base, safety_checker=None))
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    if adapter:
        pipe.load_lora_weights(adapter)
    return pipe


def ours(model):
    """Return our pipeline of a folder, with the timesteps of `stock`."""
    pipe = quiet(loading.load_pipeline(model))
    leading = DiffusionConfig(timestep_spacing="leading")
    pipe.scheduler = build.build_scheduler(leading, pipe.scheduler)
    return pipe


def sample(pipe, **call):
    """Return the pixels of "red" in three steps at guidance_scale 3."""
    generator = torch.Generator().manual_seed(0)
    options = {"guidance_scale": 3.0, "num_inference_steps": 3, "generator": generator}
    return pipe("red", output_type="np", **options | call).images
