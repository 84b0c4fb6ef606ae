"""Complete sampling chains on data whose exact denoiser is known."""

import itertools

import pytest
import torch
from scheduling import F64, linear_abar, normal, rng

from pipeline.diffusion import losses
from pipeline.diffusion.guidance import guide
from pipeline.diffusion.scheduler import (
    DDPMScheduler,
)

STANDARD = {"clip_sample": False, "timestep_spacing": "trailing"}


def gaussian_eps(x_t, abar, mu, var):
    """The exact E[eps | x_t] of data N(mu, var), by the rule for jointly Gaussian variables."""
    return (1 - abar) ** 0.5 * (x_t - abar**0.5 * mu) / (abar * var + 1 - abar)


def sample(scheduler, eps_hat, x, generator, **options):
    for t in scheduler.timesteps.tolist():
        output = eps_hat(x, linear_abar(t))
        x = scheduler.step(output, t, x, generator=generator, **options).prev_sample
    return x


def gaussian_recursion(plan, var, eta=1.0):
    """Variance of samples of data N(0, var): V <- m² V + variance, from (5) and Bayes by hand."""
    V = 1.0
    for t, s in zip(plan, [*plan[1:], -1], strict=True):
        abar_t, abar_s = (
            linear_abar(t),
            linear_abar(s) if s >= 0 else 1.0,
        )
        noise_slope = (1 - abar_t) ** 0.5 / (abar_t * var + 1 - abar_t)
        x_0_slope = (1 - (1 - abar_t) ** 0.5 * noise_slope) / abar_t**0.5
        beta_tilde = (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)
        m = abar_s**0.5 * x_0_slope + (1 - abar_s - eta**2 * beta_tilde) ** 0.5 * noise_slope
        V = m**2 * V + eta**2 * beta_tilde
    return V


def transition_recursion(scheduler, var):
    """The same variance from the scheduler's own transitions, its mean being linear in x_t."""
    V, plan = 1.0, scheduler.timesteps.tolist()
    x_t = torch.tensor([0.0, 1.0], dtype=F64)
    for t, s in zip(plan, [*plan[1:], -1], strict=True):
        x_0 = scheduler.predict_x_0(gaussian_eps(x_t, linear_abar(t), 0.0, var), t, x_t)
        mean, variance = scheduler.transition(x_0, x_t, t, s)
        V = float((mean[1] - mean[0]) ** 2 * V + variance)
    return V


@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("n", [10, 50])
def test_step_chain_on_gaussian_data_has_exact_variance(n, eta):
    """(16), (19); the slide's beta~ z in place of sqrt(beta~) z gives samples far too smooth."""
    scheduler, N, var = DDPMScheduler(**STANDARD), 100_000, 0.25
    scheduler.set_timesteps(n)
    x = sample(scheduler, lambda x, a: gaussian_eps(x, a, 0.0, var), normal(N), rng(1), eta=eta)
    expected = gaussian_recursion(scheduler.timesteps.tolist(), var, eta)
    assert abs(x.mean()) < 4 * (expected / N) ** 0.5
    assert abs(x.var() / expected - 1) < 4 * (2 / N) ** 0.5


def test_transition_bias_halves_as_the_steps_double():
    """B10: first order in 1/n, on the recursion that the test above ties to the scheduler."""
    bias = []
    for n in (50, 100, 200, 400):
        scheduler = DDPMScheduler(**STANDARD)
        scheduler.set_timesteps(n)
        bias.append(abs(transition_recursion(scheduler, 0.25) - 0.25))
    ratios = [a / b for a, b in itertools.pairwise(bias)]
    assert all(1.7 < ratio < 2.2 for ratio in ratios) and bias[-1] < 0.01, (bias, ratios)


@pytest.mark.parametrize("w", [-1.0, 0.0, 2.0])
def test_guide_between_two_gaussians_moves_the_mean(w):
    """(17): with equal covariances the samples' mean is (1 + w) mu_c - w mu_empty."""
    scheduler, N, mu_c, mu_empty, var = DDPMScheduler(**STANDARD), 50_000, 0.8, -0.3, 0.25
    scheduler.set_timesteps(100)
    x = sample(
        scheduler,
        lambda x, a: guide(gaussian_eps(x, a, mu_c, var), gaussian_eps(x, a, mu_empty, var), w),
        normal(N),
        rng(1),
    )
    expected = (1 + w) * mu_c - w * mu_empty
    start = linear_abar(999) ** 0.5 * abs(expected)  # the chain starts at mean 0
    assert abs(x.mean() - expected) < 4 * (var / N) ** 0.5 + start


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_step_survives_abar_below_float32(prediction_type):
    """At abar = 1e-47, 0 in float32, the ratio of two neighbours would be no number."""
    scheduler = DDPMScheduler(beta_end=0.2, prediction_type=prediction_type)
    x, T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), len(scheduler)
    assert float((1 - scheduler.betas.double()).prod()) < 1e-40
    for t in range(T - 1, T - 40, -1):
        x_s = scheduler.step(
            torch.zeros_like(x), t, x, generator=torch.Generator().manual_seed(t)
        ).prev_sample
        assert x_s.isfinite().all()
        assert t < T - 10 or (x_s - x).abs().max() < 1e-3, "pure noise stays what it is"
    assert losses.loss_weight(scheduler, torch.arange(T), "min_velocity", 5.0).isfinite().all()


def test_step_chain_samples_a_gaussian_mixture():
    """Exact noise of a mixture through (16), within three standard errors plus the chain's bias."""
    weights, means = (
        torch.tensor([0.5, 0.3, 0.2], dtype=F64),
        torch.tensor([[2.0, 0], [-2, 2], [-1, -3]], dtype=F64),
    )
    spread, N, n = 0.09, 20_000, 200

    def eps_hat(x, abar):
        total = abar * spread + 1 - abar
        centred = x[:, None] - abar**0.5 * means
        share = (weights.log() - centred.square().sum(-1) / (2 * total)).softmax(1)
        return ((1 - abar) ** 0.5 / total * centred * share[..., None]).sum(1)

    scheduler = DDPMScheduler(**STANDARD)
    scheduler.set_timesteps(n)
    x = sample(scheduler, eps_hat, normal(N, 2), rng(1))
    own = (x[:, None] - means).square().sum(-1).argmin(1)
    bias = abs(gaussian_recursion(scheduler.timesteps.tolist(), spread) - spread)
    for k, share in enumerate(weights):
        mine, count = x[own == k], int((own == k).sum())
        assert abs(count / N - share) < 3 * (share * (1 - share) / N) ** 0.5 + 1 / n
        assert (mine.mean(0) - means[k]).abs().max() < 3 * (spread / count) ** 0.5 + bias
        off = (mine.T.cov() - spread * torch.eye(2, dtype=F64)).abs()
        assert off.diag().max() < 3 * spread * (2 / count) ** 0.5 + bias
        assert off[0, 1] < 3 * spread / count**0.5 + bias
