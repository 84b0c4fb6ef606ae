"""The bound and the denoising errors against networks with known answers."""

import math

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline
from tiny_run import normal
from torch import nn

from pipeline.data.image_ops import as_float
from pipeline.diffusion.exact_denoiser import ExactDenoiser
from pipeline.diffusion.patches import PatchAutoencoder
from pipeline.diffusion.scheduler import DDPMScheduler
from pipeline.evaluation import likelihood

BETA = np.linspace(1e-4, 0.02, 1000)
ABAR = np.cumprod(1 - BETA)


class Gaussian(nn.Module):
    """E[x_0 | x_t] of data N(0, var), in the network's place; `calls` counts its calls."""

    dtype = torch.float64
    device = torch.device("cpu")
    calls = 0

    def __init__(self, var):
        super().__init__()
        self.var = var
        self.abar = torch.tensor(ABAR)

    def forward(self, x_t, t, encoder_hidden_states, return_dict):
        self.calls += 1
        a = self.abar[t].reshape(-1, 1, 1, 1)
        return (a.sqrt() * self.var * x_t / (a * self.var + 1 - a),)


def pipeline_of(network, vae=None):
    """The pipeline with something else in its network's place, which predicts x_0."""
    pipe = tiny_pipeline(scheduler=DDPMScheduler(prediction_type="sample"))
    pipe.unet = network
    pipe.vae = vae
    return pipe


def test_denoising_errors_are_the_gaussian_denoisers():
    """Denoised as N(0, 0.04), data N(0, v) has the error (1 - c sqrt(abar))^2 v + c^2 (1 - abar).

    That of eps is SNR times as large. One call a timestep serves both splits.
    """
    pipe = pipeline_of(Gaussian(0.04))
    variances = {"train": 0.04, "held_out": 0.01}
    splits = {
        name: (normal(40, 3, 8, 8, seed=9 + i) * v**0.5, ["red heart"] * 40)
        for i, (name, v) in enumerate(variances.items())
    }
    found = likelihood.denoising_errors(pipe, splits)
    assert found.timesteps == list(range(50, 1000, 100))
    assert pipe.unet.calls == 10
    a = ABAR[found.timesteps]
    c = a**0.5 * 0.04 / (a * 0.04 + 1 - a)
    for name, v in variances.items():
        errors = getattr(found, name)
        expected = (1 - c * a**0.5) ** 2 * v + c**2 * (1 - a)
        assert errors["x_0"] == pytest.approx(expected, rel=0.06)  # 7,680 squares: 1.6 %
        of_eps = a / (1 - a) * np.array(errors["x_0"])
        assert np.array(errors["eps"]) == pytest.approx(of_eps, rel=1e-6)


def test_likelihood_bound_sums_the_whole_chain_from_a_part():
    """Data N(0, var): each divergence is (SNR(s) - SNR(t)) mmse(t) / 2.

    -log p(x_0 | x_1) has a Gaussian's mean.
    """
    var = 0.04
    N = 60
    images = normal(N, 3, 8, 8) * var**0.5
    options = {"levels": None, "batch": 50}
    found = likelihood.likelihood_bound(pipeline_of(Gaussian(var)), images, ["red"] * N, **options)
    snr = ABAR / (1 - ABAR)
    mmse = var * (1 - ABAR) / (ABAR * var + 1 - ABAR)
    steps = ((snr[:-1] - snr[1:]) * mmse[1:] / 2).sum() / math.log(2)
    beta_tilde = (1 - ABAR[0]) / (1 - ABAR[1]) * BETA[1]
    decoder = (mmse[0] / beta_tilde + math.log(2 * math.pi * beta_tilde)) / 2 / math.log(2)
    prior = (ABAR[-1] * var - ABAR[-1] - math.log(1 - ABAR[-1])) / 2 / math.log(2)
    assert likelihood.timestep_importance(DDPMScheduler()).sum() == pytest.approx(1)
    for name, expected in (("steps", steps), ("decoder", decoder), ("prior", prior)):
        values = found[name]
        error = values.std().item() / N**0.5
        assert values.shape == (N,)
        assert values.mean().item() == pytest.approx(expected, abs=4 * error)
    assert found["steps"].std() / N**0.5 < 0.02 * steps, "a tolerance that proves nothing"


@pytest.mark.parametrize("patch_size", [None, 2])
def test_likelihood_bound_of_a_known_image_is_its_last_bin(patch_size):
    """One image has no divergence; the decoder has the Gaussian's mass within half a level."""
    image = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    vae = None if patch_size is None else PatchAutoencoder(patch_size)
    x_0 = as_float(image) if vae is None else vae.encode(as_float(image)).latents
    pipe = pipeline_of(None, vae)
    pipe.unet = ExactDenoiser(x_0, pipe.scheduler)
    found = likelihood.likelihood_bound(pipe, image, ["red heart"], strata=5)
    beta_tilde = (1 - ABAR[0]) / (1 - ABAR[1]) * BETA[1]
    value = 100 / 127.5 - 1
    inside = math.erf(1 / 255 / (2 * beta_tilde) ** 0.5)
    assert found["steps"].item() == 0
    assert found["decoder"].item() == pytest.approx(-math.log2(inside), rel=1e-5)
    prior = (ABAR[-1] * (value**2 - 1) - math.log1p(-ABAR[-1])) / 2 / math.log(2)
    assert found["prior"].item() == pytest.approx(prior, rel=1e-5)


def test_likelihood_bound_refuses_latents():
    assert likelihood.model_space(pipeline_of(Gaussian(1.0))) == "pixels"
    assert likelihood.model_space(pipeline_of(Gaussian(1.0), PatchAutoencoder(2))) == "patches"
    scaled = pipeline_of(Gaussian(1.0), PatchAutoencoder(2, scaling_factor=0.5))
    with pytest.raises(ValueError, match="'latents'"):
        likelihood.likelihood_bound(scaled, torch.zeros(1, 3, 8, 8), ["red"], strata=1)


def test_file_bits_are_8_for_noise_and_few_for_one_colour():
    """No code takes less than 8 bits for a uniform byte in the mean; one colour takes a header."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (4, 3, 64, 64), generator=generator, dtype=torch.uint8)
    plain = torch.full((4, 3, 64, 64), 7, dtype=torch.uint8)
    noise_bits = likelihood.file_bits(noise)
    plain_bits = likelihood.file_bits(plain)
    assert set(noise_bits) == set(plain_bits) == {"png", "webp"}
    for name in noise_bits:
        assert noise_bits[name].shape == (4,)
        assert ((noise_bits[name] > 8) & (noise_bits[name] < 8.5)).all()
        assert (plain_bits[name] < 0.2).all()
