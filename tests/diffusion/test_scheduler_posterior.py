"""The noise process backwards, (7) to (10) and (15), against Bayes' rule and simulation."""

import itertools

import numpy as np
import pytest
import torch
from scheduling import F64, linear_abar, make, normal, ramp, rng

from pipeline.diffusion.scheduler import (
    PREDICTION_TYPES,
    VARIANCE_TYPES,
    DDPMScheduler,
)

PAIRS = [(999, 998), (999, 0), (500, 499), (500, 250), (1, 0), (20, 3)]


@pytest.mark.parametrize("t, s", PAIRS)
def test_posterior_matches_bayes_rule(t, s):
    """(7)-(9), B9: prior q(x_s | x_0), likelihood q(x_t | x_s), multiplied by hand."""
    abar_t, abar_s = linear_abar(t), linear_abar(s)
    alpha = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[s + 1 : t + 1])
    x_0, x_t = normal(3, 5), normal(3, 5, seed=1)
    precision = 1 / (1 - abar_s) + alpha / (1 - alpha)
    expected = (abar_s**0.5 * x_0 / (1 - abar_s) + alpha**0.5 * x_t / (1 - alpha)) / precision
    mean, variance = DDPMScheduler().posterior(x_0, x_t, t, s)
    torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-12)
    assert abs(float(variance) * precision - 1) < 1e-10
    assert abs(alpha * abar_s / abar_t - 1) < 1e-12


def test_posterior_matches_simulation():
    """(8), (9) by Monte-Carlo: x_s regressed on x_t over joint draws of the forward process."""
    scheduler, N, x_0, s, t = DDPMScheduler(), 200_000, 0.7, 200, 400
    x_s = scheduler.add_noise(torch.full((N,), x_0, dtype=F64), normal(N), s)
    x_t = scheduler.add_noise_step(x_s, normal(N, seed=1), t, s)
    slope = ((x_t - x_t.mean()) * x_s).mean() / x_t.var()
    left = x_s - x_s.mean() - slope * (x_t - x_t.mean())
    probe = torch.tensor([0.0, 1.0], dtype=F64)
    mean, variance = scheduler.posterior(torch.full((2,), x_0, dtype=F64), probe, t, s)
    error = (variance / N) ** 0.5 / x_t.std()
    assert abs(mean[1] - mean[0] - slope) < 4 * error
    assert abs(mean[0] - (x_s.mean() - slope * x_t.mean())) < 4 * error * (1 + x_t.mean().abs())
    assert abs(left.var() / variance - 1) < 4 * (2 / N) ** 0.5


def test_posterior_chain_keeps_the_marginals():
    """B10: with the true x_0 at hand, any chain of posteriors stays on q(x_s | x_0)."""
    scheduler, N, plan, generator = DDPMScheduler(), 100_000, [999, 700, 300, 40, 3], rng(2)
    x_0 = 2 + 0.5 * normal(N)
    x = scheduler.add_noise(x_0, normal(N, seed=1), plan[0])
    for t, s in itertools.pairwise(plan):
        mean, variance = scheduler.posterior(x_0, x, t, s)
        x = mean + variance.sqrt() * torch.randn(N, generator=generator, dtype=F64)
        abar = linear_abar(s)
        expected = abar * 0.25 + 1 - abar
        assert abs(x.mean() - 2 * abar**0.5) < 4 * (expected / N) ** 0.5
        assert abs(x.var() / expected - 1) < 4 * (2 / N) ** 0.5


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_predict_x_0_and_predict_eps_invert_add_noise(prediction):
    """(15) and its relatives, for one timestep per example."""
    scheduler, t = DDPMScheduler(prediction_type=prediction), torch.tensor([0, 10, 500, 999])
    x_0, eps = normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1)
    x_t = scheduler.add_noise(x_0, eps, t)
    output = {"epsilon": eps, "sample": x_0, "v_prediction": scheduler.get_velocity(x_0, eps, t)}[
        prediction
    ]
    torch.testing.assert_close(scheduler.predict_x_0(output, t, x_t), x_0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scheduler.predict_eps(x_0, x_t, t), eps, rtol=1e-10, atol=1e-10)


def test_posterior_and_step_compute_bfloat16_in_float32():
    scheduler, x_0, x_t = DDPMScheduler(), normal(2, 64), normal(2, 64, seed=1)
    low = [x.bfloat16() for x in (x_0, x_t)]
    mean, variance = scheduler.posterior(*low, 500, 499)
    exact = scheduler.posterior(*[x.double() for x in low], 500, 499)
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean.double(), exact[0], rtol=1e-4, atol=1e-5)
    exact_eps = scheduler.predict_eps(*[x.double() for x in low], 500)
    torch.testing.assert_close(
        scheduler.predict_eps(*low, 500).double(), exact_eps, rtol=1e-4, atol=1e-5
    )
    assert scheduler.step(low[0], 500, low[1], generator=rng()).prev_sample.dtype == torch.bfloat16
    for eta in (0.0, 0.5):
        steps = (500, 499), (torch.tensor([500, 500]), torch.tensor([499, 499]))
        one, each = (scheduler.transition(*low, t, s, eta=eta)[0] for t, s in steps)
        torch.testing.assert_close(one, each, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variance", VARIANCE_TYPES)
def test_transition_to_the_clean_image_has_no_variance(variance):
    """B2, for a single timestep and for one per example."""
    scheduler, x_0 = make(variance_type=variance), 2 * ramp() - 1
    x_t = scheduler.add_noise(x_0, torch.randn(x_0.shape, generator=rng()), 19)
    for t, s in ((19, -1), (torch.full((len(x_0),), 19), torch.full((len(x_0),), -1))):
        mean, variance_s = scheduler.transition(x_0, x_t, t, s)
        assert not variance_s.any() and torch.allclose(mean.to(x_0.dtype), x_0, atol=1e-6)


def test_clip_thresholding_rescales_and_warns_at_one():
    """B5: an image is divided by its own 0.995-quantile where that is above 1."""
    x_0 = torch.linspace(-3, 3, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    x_0[1] *= 0.1
    out = make(thresholding=True, sample_max_value=None, prediction_type="sample").clip(x_0)
    size = np.quantile(x_0[0].abs().numpy(), 0.995)
    assert size > 2.9 and np.allclose(
        out[0], np.clip(x_0[0].numpy(), -size, size) / size, atol=1e-6
    )
    assert torch.equal(out[1], x_0[1]) and not torch.allclose(out[0], x_0[0].clamp(-1, 1))
    with pytest.warns(UserWarning, match="sample_max_value=1.0"):
        clamp = make(thresholding=True).clip(x_0)
    assert torch.equal(clamp, x_0.clamp(-1, 1))
    with pytest.warns(UserWarning, match="sample_max_value=0.5"):
        assert torch.equal(
            make(thresholding=True, sample_max_value=0.5).clip(x_0), x_0.clamp(-0.5, 0.5) / 0.5
        )


def posterior_with_exchanged_factors(posterior, self, x_0, x_t, t, s):
    return posterior(self, x_t, x_0, t, s)


def posterior_with_variance_beta(posterior, self, x_0, x_t, t, s):
    mean, _ = posterior(self, x_0, x_t, t, s)
    return mean, 1 - self.abar(t, x_t) / self.abar(s, x_t)


@pytest.mark.parametrize("wrong", [posterior_with_exchanged_factors, posterior_with_variance_beta])
def test_semantic_breaks_are_noticed(monkeypatch, wrong):
    posterior = DDPMScheduler.posterior
    monkeypatch.setattr(DDPMScheduler, "posterior", lambda *a: wrong(posterior, *a))
    with pytest.raises(AssertionError):
        test_posterior_matches_bayes_rule(500, 250)
