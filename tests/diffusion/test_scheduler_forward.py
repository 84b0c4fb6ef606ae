"""The noise process forwards, (1) to (6), against oracles that know nothing of its code."""

import diffusers
import numpy as np
import pytest
import torch
from scheduling import F64, linear_abar, make, normal, rng

from pipeline.diffusion.scheduler import (
    BETA_SCHEDULES,
    DDPMScheduler,
)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("T", [1000, 100])
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_betas_match_diffusers_schedules(schedule, T, zero):
    config = {"beta_schedule": schedule, "num_train_timesteps": T, "rescale_betas_zero_snr": zero}
    ours, theirs = DDPMScheduler(**config), diffusers.DDPMScheduler(**config)
    torch.testing.assert_close(
        ours.betas, theirs.betas, rtol=2e-3, atol=1e-6
    )  # theirs carries float32 cancellation
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    assert not zero or ours.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_abar_is_the_product_of_alphas(t):
    """(4): abar is the product, not its root as in the slide's brace. At t = -1 it is 1."""
    abar = DDPMScheduler().abar(t, normal(1))
    assert abs(float(abar) / linear_abar(t) - 1) < 1e-12
    assert abs(float(abar) / linear_abar(t) ** 0.5 - 1) > 4e-5
    assert DDPMScheduler().abar(-1, normal(1)) == 1


def test_add_noise_step_chain_has_the_moments_of_add_noise():
    """(1)-(5) by Monte-Carlo: mean sqrt(abar) x_0, variance 1 - abar (the slide has its root)."""
    scheduler, N, x_0, generator = DDPMScheduler(), 40_000, 1.5, rng()
    x = torch.full((N,), x_0, dtype=F64)
    for t in range(300):
        x = scheduler.add_noise_step(x, torch.randn(N, generator=generator, dtype=F64), t)
    jump = scheduler.add_noise(torch.full((N,), x_0, dtype=F64), normal(N, seed=1), 299)
    abar = linear_abar(299)
    for sample in (x, jump):
        assert abs(sample.mean() - abar**0.5 * x_0) < 4 * ((1 - abar) / N) ** 0.5
        assert abs(sample.var() / (1 - abar) - 1) < 4 * (2 / N) ** 0.5
        assert abs(sample.var() / (1 - abar) ** 0.5 - 1) > 0.1


def test_add_noise_step_preserves_variance_per_dimension():
    """(2): E‖x_t‖² / d stays 1; the slide's E‖eps‖² = 1 would be off by the factor d."""
    scheduler, d, x, generator = DDPMScheduler(), 100_000, normal(1, 100_000).sign(), rng(1)
    for t in range(0, 1000, 50):
        x = scheduler.add_noise_step(x, torch.randn(x.shape, generator=generator, dtype=F64), t)
        assert abs(x.square().sum() / d - 1) < 4 * (2 / d) ** 0.5


def test_add_noise_step_twice_equals_one_long_step():
    """(3): the step from s to t equals, in distribution, the two steps through the middle."""
    scheduler, zero, one = DDPMScheduler(), torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)

    def scale_and_variance(t, s):
        return scheduler.add_noise_step(one, zero, t, s), scheduler.add_noise_step(
            zero, one, t, s
        ) ** 2

    (a, u), (b, v), (c, w) = (
        scale_and_variance(*pair) for pair in [(400, 100), (900, 400), (900, 100)]
    )
    assert abs(a * b / c - 1) < 1e-12 and abs((b**2 * u + v) / w - 1) < 1e-12


def test_abar_at_the_end_leaves_only_noise():
    """(6): nothing of the image is left at T."""
    abar = DDPMScheduler().abar(999, normal(1))
    assert (
        0 < abar < 1e-4
        and abs(float(DDPMScheduler().snr(999, normal(1))) - float(abar / (1 - abar))) < 1e-12
    )


def test_get_velocity_is_the_derivative_along_the_circle():
    """x_t = cos(phi) x_0 + sin(phi) eps, v = dx/dphi, by central differences."""
    x_0, eps, t = normal(2, 5), normal(2, 5, seed=1), 300
    phi, h = np.arccos(linear_abar(t) ** 0.5), 1e-5
    x = [np.cos(phi + d) * x_0 + np.sin(phi + d) * eps for d in (-h, h)]
    torch.testing.assert_close(
        DDPMScheduler().get_velocity(x_0, eps, t), (x[1] - x[0]) / (2 * h), rtol=1e-8, atol=1e-8
    )


def test_add_noise_in_bfloat16_has_the_right_noise_level():
    """B6; with coefficients in bfloat16 sigma is 0 for ten timesteps."""
    scheduler, ones = make(), torch.ones(1000, 1, dtype=torch.bfloat16)
    sigma = scheduler.add_noise(0 * ones, ones, torch.arange(1000)).double().flatten()
    exact = (1 - np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))) ** 0.5
    assert np.abs(sigma.numpy() / exact - 1).max() < 1e-2


def test_semantic_breaks_are_noticed(monkeypatch):
    """abar as the root of the product, and a direct jump with signal and noise exchanged."""
    scheduler = DDPMScheduler
    abar, add_noise = scheduler.abar, scheduler.add_noise
    with monkeypatch.context() as broken:
        broken.setattr(scheduler, "abar", lambda self, t, like: abar(self, t, like).sqrt())
        with pytest.raises(AssertionError):
            test_abar_is_the_product_of_alphas(500)
    monkeypatch.setattr(scheduler, "add_noise", lambda self, x, eps, t: add_noise(self, eps, x, t))
    with pytest.raises(AssertionError):
        test_add_noise_step_chain_has_the_moments_of_add_noise()
