"""The networks and the scheduler of a run come out as the settings say."""

import dataclasses

import diffusers
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler
from diffusers.models.attention_processor import AttnProcessor
from finetuning import tiny_vae

from pipeline.config import Config, ConfigError, DataConfig, DiffusionConfig, ModelConfig
from pipeline.data.latent_cache import posterior_moments
from pipeline.diffusion.autoencoder import ConvAutoencoder
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.models import build

SMALL = Config(
    data=DataConfig(resolution=16),
    model=ModelConfig(channels=(32, 64), attention=(False, True), heads=4),
)


def small_unet(**model):
    """Build the denoiser of SMALL with other settings of the model."""
    config = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, **model))
    return build.build_unet(config, 384, build.build_autoencoder(config.model))


@pytest.mark.parametrize(("patch_size", "shape"), [(None, (3, 16, 16)), (2, (12, 8, 8))])
@pytest.mark.parametrize("text_in_time", [True, False])
def test_build_unet_takes_latents_and_captions(patch_size, shape, text_in_time):
    unet = small_unet(patch_size=patch_size, text_in_time=text_in_time)
    vae = build.build_autoencoder(ModelConfig(patch_size=patch_size))
    x = torch.randn(2, 3, 16, 16)
    z = x if vae is None else vae.encode(x).latents
    out = unet(z, torch.tensor([3, 7]), torch.randn(2, 5, 384), return_dict=False)[0]
    assert out.shape == z.shape == (2, *shape)
    assert unet.config.sample_size == z.shape[-1]


def test_build_unet_fits_the_latents_of_a_trained_autoencoder(tmp_path):
    ConvAutoencoder((3, 4, 8, 16), 1, 1, latent_channels=6).save_pretrained(tmp_path)
    unet = small_unet(autoencoder=str(tmp_path))
    assert (unet.config.in_channels, unet.config.out_channels) == (6, 6)
    assert unet.config.sample_size == SMALL.data.resolution // 8


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_build_autoencoder_loads_those_of_diffusers(kind, tmp_path):
    saved = tiny_vae(kind)
    saved.save_pretrained(tmp_path)
    vae = build.build_autoencoder(ModelConfig(autoencoder=str(tmp_path)))
    assert type(vae) is type(saved)
    assert not any(weight.requires_grad for weight in vae.parameters())
    x = torch.randn(1, 3, 16, 16)
    moments = [posterior_moments(which.eval(), x) for which in (vae, saved)]
    assert torch.equal(moments[0][0], moments[1][0])
    assert build.latent_geometry(vae) == (4, x.shape[-1] // moments[0][0].shape[-1])


def test_build_autoencoder_refuses_other_models(tmp_path):
    small_unet().save_pretrained(tmp_path / "unet")
    for folder in (tmp_path / "unet", tmp_path / "missing"):
        with pytest.raises(ConfigError, match="model.autoencoder"):
            build.build_autoencoder(ModelConfig(autoencoder=str(folder)))


def test_build_scheduler_clips_pixels_but_not_latents():
    assert build.build_scheduler(DiffusionConfig()).config.clip_sample
    assert not build.build_scheduler(DiffusionConfig(), latents=True).config.clip_sample
    chosen = build.build_scheduler(DiffusionConfig(clip_sample=True), latents=True)
    assert chosen.config.clip_sample


def test_prepare_for_training_uses_two_products_on_a_cpu():
    fused = small_unet()
    plain = small_unet()
    plain.load_state_dict(fused.state_dict())
    plain = build.prepare_for_training(plain, torch.device("cpu"))
    assert {type(p) for p in plain.attn_processors.values()} == {AttnProcessor}
    assert plain.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    inputs = (torch.randn(2, 3, 16, 16), torch.tensor([3, 7]), torch.randn(2, 5, 384))
    with torch.no_grad():
        a, b = (network(*inputs, return_dict=False)[0] for network in (fused, plain))
    assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(("given", "width"), [(None, 4 * 32), (80, 80)])
def test_build_unet_takes_the_time_embedding_width(given, width):
    unet = small_unet(time_embedding_dim=given)
    assert unet.time_embedding.linear_2.out_features == width


def test_build_unet_puts_the_caption_into_the_time_embedding():
    unet = small_unet()
    assert unet.config.addition_embed_type == "text" and hasattr(unet, "add_embedding")


def test_build_scheduler_keeps_a_pretrained_schedule():
    theirs = DDPMScheduler(beta_schedule="sigmoid", clip_sample=False)
    found = build.build_scheduler(DiffusionConfig(timestep_spacing="leading"), theirs)
    assert torch.equal(found.betas, theirs.betas)
    assert found.config.timestep_spacing == "leading"


def test_build_scheduler_warns_only_of_what_can_be_changed(recwarn):
    """The chain of Stable Diffusion ends at abar = 0.0047; its network was trained on it."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    theirs = PNDMScheduler(**betas)
    build.build_scheduler(DiffusionConfig(), theirs)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="the chain ends"):
        build.build_scheduler(DiffusionConfig(beta_end=0.011), theirs)


@pytest.mark.parametrize(
    "other", [{"beta_schedule": "linear"}, {"beta_end": 0.03}, {"num_train_timesteps": 2000}]
)
def test_build_scheduler_replaces_a_whole_pretrained_schedule(other):
    """A pretrained scheduler lists its betas, which would win over a new range."""
    theirs = DDPMScheduler(beta_schedule="sigmoid", clip_sample=False)
    wanted = DDPMScheduler(**{"beta_schedule": "sigmoid"} | other)
    assert torch.equal(build.build_scheduler(DiffusionConfig(**other), theirs).betas, wanted.betas)


def test_build_scheduler_takes_a_solver_without_variance():
    """DPMSolverMultistepScheduler has variance_type: null and no clip_sample."""
    theirs = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_end=0.02, prediction_type="v_prediction"
    )
    found = build.build_scheduler(DiffusionConfig(), theirs)
    assert found.config.variance_type == "fixed_small"
    assert found.config.prediction_type == "v_prediction"
    assert found.config.clip_sample is False
    torch.testing.assert_close(found.betas, theirs.betas)


def test_build_scheduler_refuses_learned_variances():
    theirs = diffusers.DDPMScheduler(variance_type="learned_range")
    with pytest.raises(ConfigError, match="learned_range"):
        build.build_scheduler(DiffusionConfig(), theirs)
