"""The perfect denoiser is Bayes' rule; the pipeline over it samples its own images alone."""

import math

import numpy as np
import pytest
import torch
from datasets_on_disk import render_emoji
from tiny import tiny_text

from pipeline.data.emoji import catalogue
from pipeline.diffusion.exact_denoiser import (
    ExactDenoiser,
    expected_x_0,
    irreducible_loss,
    posterior_weights,
)
from pipeline.diffusion.patches import PatchAutoencoder
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.diffusion.text_to_image import TextToImagePipeline

SIZE = 16
NAMES = (
    "red heart",
    "yellow heart",
    "blue circle",
    "green square",
    "cat face",
    "dog face",
    "red circle",
    "yellow square",
)


@pytest.fixture(scope="module")
def faces() -> torch.Tensor:
    """32 different real emoji, (32, 3, 16, 16) in [-1, 1]."""
    entries = [e for e in catalogue.select_split("emoji-small")["train"] if e.grid is None][:64:2]
    pixels = np.stack([np.array(render_emoji(e.path, SIZE)) for e in entries])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def scheduler(prediction_type: str = "epsilon", **config) -> DDPMScheduler:
    return DDPMScheduler(prediction_type=prediction_type, timestep_spacing="trailing", **config)


def pipeline_of(
    images: torch.Tensor,
    prediction_type: str = "epsilon",
    captions: list[str] | None = None,
    patch_size: int | None = None,
) -> TextToImagePipeline:
    """The pipeline over the exact denoiser of images, with a tiny text encoder."""
    tokenizer, encoder = tiny_text("bert")
    vae = None if patch_size is None else PatchAutoencoder(patch_size)
    noise = scheduler(prediction_type)
    pipe = TextToImagePipeline(None, noise, encoder, tokenizer, vae, caption_length=8)

    def encode(texts):
        return pipe.encode_prompt(texts, do_classifier_free_guidance=False)[0]

    captions = captions or [""] * len(images)
    latents = images if vae is None else vae.encode(images).latents
    pipe.unet = ExactDenoiser(latents, noise, encode(captions), encode([""]))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def which(drawn: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The index (B,) of the dataset's image that each sample in [0, 1] is; each must be one."""
    distance = torch.cdist((drawn * 2 - 1).flatten(1), images.flatten(1)) / math.sqrt(
        images[0].numel()
    )
    assert distance.amin(1).max() < 0.02  # of a range of 2
    return distance.argmin(1)


@pytest.mark.parametrize("t", [0, 10, 300, 999])
def test_posterior_weights_match_brute_force(faces, t):
    """p(i | x_t) = N(x_t; sqrt(abar) x_i, (1 - abar) I) / sum over j, pixel by pixel in float64."""
    noise, images = scheduler(), faces.double()
    generator = torch.Generator().manual_seed(t)
    x_t = noise.add_noise(
        images[:6], torch.randn(images[:6].shape, generator=generator, dtype=torch.float64), t
    )
    abar = math.prod(1 - b for b in np.linspace(1e-4, 0.02, 1000)[: t + 1])
    density = torch.tensor(
        [
            [
                torch.distributions.Normal(abar**0.5 * image, (1 - abar) ** 0.5).log_prob(x).sum()
                for image in images
            ]
            for x in x_t
        ]
    )
    expected = (density - density.logsumexp(1, keepdim=True)).exp()
    torch.testing.assert_close(
        posterior_weights(images, x_t, noise, t), expected, atol=1e-8, rtol=1e-6
    )
    mean = torch.einsum("bn,nchw->bchw", expected, images)
    torch.testing.assert_close(expected_x_0(images, x_t, noise, t), mean, atol=1e-8, rtol=1e-6)


def test_expected_x_0_takes_a_timestep_per_example(faces):
    noise, t = scheduler(), torch.tensor([5, 400, 950])
    x_t = noise.add_noise(
        faces[:3], torch.randn(faces[:3].shape, generator=torch.Generator().manual_seed(0)), t
    )
    together = expected_x_0(faces, x_t, noise, t)
    alone = torch.cat([expected_x_0(faces, x_t[i : i + 1], noise, int(t[i])) for i in range(3)])
    torch.testing.assert_close(together, alone)


def test_exact_denoiser_predicts_its_prediction_type(faces):
    """The three outputs are one x_0 by the scheduler's own (15)."""
    x_t = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    for kind in ("sample", "epsilon", "v_prediction"):
        noise = scheduler(kind)
        out = ExactDenoiser(faces, noise)(x_t, 600, return_dict=False)[0]
        assert out.dtype == torch.float32
        expected = expected_x_0(faces, x_t, noise, 600)
        torch.testing.assert_close(noise.predict_x_0(out, 600, x_t), expected, atol=2e-4, rtol=0)


def test_expected_x_0_has_the_lowest_error(faces):
    """E[x_0 | x_t] has the least squared error: scaling it or mixing in the mean makes it worse."""
    noise, t = scheduler(), 700
    x_0 = faces.repeat(16, 1, 1, 1)
    x_t = noise.add_noise(
        x_0, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(2)), t
    )
    best, mean = expected_x_0(faces, x_t, noise, t), faces.mean(0)

    def error(guess):
        return (guess - x_0).square().mean()

    for other in (0.9 * best, 1.1 * best, 0.9 * best + 0.1 * mean, 1.1 * best - 0.1 * mean):
        assert error(best) < error(other)


def test_irreducible_loss_grows_to_the_data_variance(faces):
    noise = scheduler(beta_schedule="squaredcos_cap_v2")
    losses = [irreducible_loss(faces, noise, t).mean().item() for t in (0, 400, 700, 850, 950, 999)]
    variance = (faces - faces.mean(0)).square().mean().item()
    assert losses == sorted(losses)
    assert losses[0] < 1e-12
    assert losses[-1] == pytest.approx(variance, rel=1e-2)


def test_irreducible_loss_of_two_points_is_the_integral():
    """For x_0 = +-1, E[x_0 | x_t] = tanh(sqrt(abar) x_t / (1 - abar)); the error by quadrature."""
    noise, t, n = scheduler(), 200, 8_000
    abar = float(noise.abar(t, torch.zeros(1, dtype=torch.float64)))
    x_0 = torch.tensor([1.0, -1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    eps = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    guess = torch.tanh(abar**0.5 * (abar**0.5 + (1 - abar) ** 0.5 * eps) / (1 - abar))
    expected = torch.trapezoid(
        (guess - 1) ** 2 * torch.exp(-(eps**2) / 2) / math.sqrt(2 * math.pi), eps
    ).item()
    generator = torch.Generator().manual_seed(3)
    draws = torch.cat(
        [
            irreducible_loss(
                x_0, noise, t, torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
            )
            for _ in range(n // 2)
        ]
    )
    assert abs(draws.mean().item() - expected) < 3 * draws.std().item() / math.sqrt(n)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prediction_type", "patch_size"), [("epsilon", None), ("sample", 4), ("v_prediction", None)]
)
def test_exact_denoiser_samples_images_equally_often(faces, prediction_type, patch_size):
    """Chi-square on 640 samples: ancestral sampling with the exact score is exact in the limit."""
    pipe = pipeline_of(faces, prediction_type, patch_size=patch_size)
    drawn = pipe([""] * 640, seed=0, num_inference_steps=40, output_type="pt", w=0).images
    counts = torch.bincount(which(drawn, faces), minlength=len(faces)).double()
    chi_square = ((counts - 20) ** 2 / 20).sum().item()
    assert (
        31 - 3 * math.sqrt(62) < chi_square < 31 + 4 * math.sqrt(62)
    )  # 31 degrees of freedom: mean 31, variance 62


def test_exact_denoiser_keeps_to_a_captions_images(faces):
    captions = [NAMES[i % 8] for i in range(32)]
    pipe = pipeline_of(faces, captions=captions)
    drawn = pipe(list(NAMES) * 25, seed=1, num_inference_steps=40, output_type="pt", w=0).images
    found = which(drawn, faces)
    assert [captions[i] for i in found] == list(NAMES) * 25
    counts = torch.bincount(found, minlength=32).double()
    chi_square = ((counts - 6.25) ** 2 / 6.25).sum().item()
    assert chi_square < 24 + 4 * math.sqrt(48)  # 8 captions of 4 images: 8 * 3 degrees of freedom


@pytest.mark.parametrize("w", [1.0, 4.0])
def test_exact_denoiser_keeps_to_them_under_guidance(faces, w):
    captions = [NAMES[i % 8] for i in range(32)]
    pipe = pipeline_of(faces, "sample", captions)
    drawn = pipe(list(NAMES) * 4, seed=2, num_inference_steps=40, output_type="pt", w=w).images
    assert [captions[i] for i in which(drawn, faces)] == list(NAMES) * 4


def test_exact_denoiser_at_w_minus_one_ignores_captions(faces):
    captions = [NAMES[i % 8] for i in range(32)]
    pipe = pipeline_of(faces, captions=captions)
    options = {"seed": 3, "num_inference_steps": 20, "output_type": "pt"}
    drawn = pipe(["cat face"] * 40, w=-1, **options).images
    assert torch.equal(drawn, pipe([""] * 40, w=0, **options).images)
    assert len({captions[i] for i in which(drawn, faces)}) == 8


def test_exact_denoiser_refuses_captions_of_no_image(faces):
    pipe = pipeline_of(faces[:8], captions=list(NAMES))
    with pytest.raises(ValueError, match=r"captions \[1\]"):
        pipe(["cat face", "green heart"], w=0, num_inference_steps=2)


def test_exact_denoiser_without_captions_is_unconditional(faces):
    denoiser = ExactDenoiser(faces, scheduler())
    x_t = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
    out = denoiser(x_t, 500, torch.ones(2, 8, 16)).sample
    assert torch.equal(out, denoiser(x_t, 500).sample)
    assert (denoiser.config.in_channels, denoiser.config.sample_size) == (3, (SIZE, SIZE))
