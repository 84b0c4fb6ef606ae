"""The objectives against each other, against closed forms and against the likelihood they bound."""

import itertools
import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from scheduling import F64, linear_abar, normal
from torch.distributions import Normal, kl_divergence

from pipeline.config import TrainConfig
from pipeline.diffusion.losses import (
    LOSS_WEIGHTS,
    bits_per_dimension,
    decoder_nll,
    kl_noise_weight,
    loss_weight,
    network_target,
    noise_kl,
    posterior_kl,
    prior_kl,
    training_loss,
)
from pipeline.diffusion.scheduler import PREDICTION_TYPES, DDPMScheduler


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("name", LOSS_WEIGHTS)
def test_training_loss_agrees_for_all_prediction_types(name, gamma):
    """The three predictions of one x_0_hat have one loss: w(SNR) times the squared error of x_0."""
    gamma = gamma if name.startswith("min_") else None
    t, (x_0, x_0_hat, eps) = (
        torch.tensor([5, 100, 500, 900]),
        (normal(4, 3, 4, 4, seed=i) for i in range(3)),
    )
    snr = torch.tensor([a / (1 - a) for a in map(linear_abar, t.tolist())])
    in_x_0 = {
        "simple": snr,
        "min_snr": snr,
        "velocity": 1 + snr,
        "min_velocity": 1 + snr,
        "x_0": 1 + 0 * snr,
    }[name]
    in_x_0 = in_x_0 if gamma is None else torch.minimum(in_x_0, torch.tensor(gamma))
    expected = in_x_0 * (x_0 - x_0_hat).square().mean((1, 2, 3))
    for prediction in PREDICTION_TYPES:
        scheduler = DDPMScheduler(prediction_type=prediction)
        eps_hat = scheduler.predict_eps(x_0_hat, scheduler.add_noise(x_0, eps, t), t)
        abar = scheduler.abar(t, x_0)
        v_hat = abar.sqrt() * eps_hat - (1 - abar).sqrt() * x_0_hat
        output = {"epsilon": eps_hat, "sample": x_0_hat, "v_prediction": v_hat}[prediction]
        loss = training_loss(scheduler, output, x_0, eps, t, name, gamma)
        assert loss.shape == (4,)
        torch.testing.assert_close(
            loss, expected, rtol=1e-3, atol=0
        )  # weights are float32: 1 - abar loses digits


def test_training_loss_is_the_plain_noise_error():
    """(13): exactly, since its weight is 1."""
    eps, output, t = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1), torch.tensor([0, 999])
    loss = training_loss(DDPMScheduler(), output, normal(2, 3, 4, 4, seed=2), eps, t)
    torch.testing.assert_close(loss, (eps - output).square().mean((1, 2, 3)), rtol=0, atol=0)


def test_loss_weights_are_those_of_the_config():
    names = get_args(get_type_hints(TrainConfig)["weighting"])
    assert set(names) == set(LOSS_WEIGHTS)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_network_target_inverts_predict_x_0(prediction):
    scheduler, t = DDPMScheduler(prediction_type=prediction), torch.tensor([3, 400, 999])
    x_0, eps = normal(3, 5), normal(3, 5, seed=1)
    out = scheduler.predict_x_0(
        network_target(scheduler, x_0, eps, t), t, scheduler.add_noise(x_0, eps, t)
    )
    torch.testing.assert_close(out, x_0, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_loss_weight_refuses_epsilon_at_zero_snr():
    t = torch.tensor([3, 999])
    with pytest.raises(ValueError, match="SNR = 0"):
        loss_weight(DDPMScheduler(rescale_betas_zero_snr=True), t)
    for prediction in ("sample", "v_prediction"):
        scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction)
        assert loss_weight(scheduler, t, "min_velocity", 5.0)[1] == 1


@pytest.mark.parametrize(
    "name, gamma, offence",
    [
        ("p2", None, "'p2'"),
        ("min_snr", None, "'min_snr' .*None"),
        ("simple", 5.0, "'simple' .*5.0"),
        ("min_velocity", 0.0, "'min_velocity' .*0.0"),
        ("min_velocity", math.inf, "'min_velocity' .*inf"),
    ],
)
def test_loss_weight_refuses_meaningless_settings(name, gamma, offence):
    with pytest.raises(ValueError, match=offence):
        loss_weight(DDPMScheduler(), torch.tensor([5]), name, gamma)


# -- the bound ------------------------------------------------------------


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("t, s", [(999, 998), (500, 400), (1, 0)])
def test_posterior_kl_matches_torch(t, s, variance):
    """(11): KL(q ‖ p), this way round."""
    scheduler, (x_0, x_0_hat, x_t) = (
        DDPMScheduler(variance_type=variance),
        (normal(4, 6, seed=i) for i in range(3)),
    )
    mean, beta_tilde = scheduler.posterior(x_0, x_t, t, s)
    q = Normal(mean, beta_tilde.sqrt())
    alpha = linear_abar(t) / linear_abar(s)
    deviation = (
        q.scale if variance == "fixed_small" else torch.tensor((1 - alpha) ** 0.5, dtype=F64)
    )
    p = Normal(scheduler.posterior(x_0_hat, x_t, t, s)[0], deviation)
    expected = kl_divergence(q, p).sum(1)
    torch.testing.assert_close(
        posterior_kl(scheduler, x_0, x_0_hat, x_t, t, s), expected, rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_posterior_kl_is_the_weighted_noise_error(t):
    """(11) = (12), with the slides' factor beta² / (2 beta~ alpha (1 - abar))."""
    scheduler, x_0, eps, eps_hat = (
        DDPMScheduler(),
        normal(4, 6),
        normal(4, 6, seed=1),
        normal(4, 6, seed=2),
    )
    x_t = scheduler.add_noise(x_0, eps, t)
    abar, before = linear_abar(t), linear_abar(t - 1)
    beta = np.linspace(1e-4, 0.02, 1000)[t]
    factor = beta**2 / (2 * (1 - before) / (1 - abar) * beta * (1 - beta) * (1 - abar))
    in_noise = noise_kl(scheduler, eps, eps_hat, t, t - 1)
    in_mean = posterior_kl(scheduler, x_0, scheduler.predict_x_0(eps_hat, t, x_t), x_t, t, t - 1)
    torch.testing.assert_close(
        in_noise, factor * (eps - eps_hat).square().sum(1), rtol=1e-8, atol=0
    )
    torch.testing.assert_close(in_mean, in_noise, rtol=1e-7, atol=0)


def test_posterior_kl_refuses_the_clean_image():
    """beta~_1 = 0: the slide's (11) is infinite at t = 1, and refused."""
    x = normal(2, 3)
    with pytest.raises(ValueError, match="s = -1"):
        posterior_kl(DDPMScheduler(), x, x, x, 0, -1)
    with pytest.raises(ValueError, match="s = -1"):
        kl_noise_weight(DDPMScheduler(), 0, -1, x)


@pytest.mark.parametrize("t", [100, 999])
def test_prior_kl_matches_torch(t):
    """(6) in nats."""
    x_0, abar = normal(3, 5), linear_abar(t)
    q = Normal(abar**0.5 * x_0, torch.tensor((1 - abar) ** 0.5, dtype=F64))
    expected = kl_divergence(q, Normal(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64))).sum(1)
    torch.testing.assert_close(prior_kl(DDPMScheduler(), x_0, t), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("deviation", [0.002, 0.1, 1.0])
def test_decoder_nll_is_a_distribution_over_the_levels(deviation):
    """The 256 probabilities of one pixel sum to 1, wherever the mean lies."""
    levels, variance = torch.linspace(-1, 1, 256, dtype=F64), torch.tensor(deviation**2, dtype=F64)
    for mean in (-1.0, -0.3, 0.999, 1.2):
        total = (
            (-decoder_nll(levels[:, None], torch.full((256, 1), mean, dtype=F64), variance))
            .exp()
            .sum()
        )
        assert abs(total - 1) < 1e-9


def test_decoder_nll_far_from_the_mean_stays_finite():
    """200 standard deviations out, where a difference of two probabilities would be log 0."""
    x_0, variance = torch.tensor([[0.5], [-0.5]], dtype=F64), torch.tensor(2.5e-3**2, dtype=F64)
    nats = decoder_nll(x_0, torch.zeros(2, 1, dtype=F64), variance)
    nearest = (0.5 - 1 / 255) / 2.5e-3
    assert nats.isfinite().all() and torch.allclose(nats[0], nats[1])
    assert nearest**2 / 2 < nats[0] < nearest**2 / 2 + 10


def test_decoder_nll_of_continuous_data_is_a_density():
    x_0, mean, variance = normal(3, 4), normal(3, 4, seed=1), torch.tensor(0.3, dtype=F64)
    expected = -Normal(mean, variance.sqrt()).log_prob(x_0).sum(1)
    torch.testing.assert_close(decoder_nll(x_0, mean, variance, levels=None), expected)


def gaussian_bound(scheduler, abar, var, x_0, generator):
    """The bound on -log p(x_0) (N,) of data N(0, var): prior, every step and decoder."""
    plan = scheduler.timesteps.tolist()
    bound = prior_kl(scheduler, x_0, plan[0])
    for t, s in itertools.pairwise([*plan, -1]):
        eps = torch.randn(x_0.shape, generator=generator, dtype=F64)
        x_t = scheduler.add_noise(x_0, eps, t)
        eps_hat = (1 - abar[t]) ** 0.5 * x_t / (abar[t] * var + 1 - abar[t])
        x_0_hat = scheduler.predict_x_0(eps_hat, t, x_t)
        if s >= 0:
            bound = bound + posterior_kl(scheduler, x_0, x_0_hat, x_t, t, s)
        else:
            variance = scheduler.posterior(x_0, x_t, 1, 0)[1]  # beta~_2, since beta~_1 = 0
            bound = bound + decoder_nll(x_0, x_0_hat, variance, levels=None)
    return bound


def test_kl_terms_bound_the_likelihood_ever_closer():
    """For data N(0, 0.25) and betas shrinking as 1 / T the bound exceeds the known likelihood."""
    var, N = 0.25, 4000
    x_0 = normal(N, 1) * var**0.5
    nll = -Normal(0, torch.tensor(var**0.5, dtype=F64)).log_prob(x_0).sum(1)
    gaps = []
    for T in (25, 100, 400):
        scheduler = DDPMScheduler(num_train_timesteps=T, beta_start=0.1 / T, beta_end=20 / T)
        abar = np.cumprod(1 - np.linspace(0.1 / T, 20 / T, T))
        generator = torch.Generator().manual_seed(1)
        gap = gaussian_bound(scheduler, abar, var, x_0, generator) - nll
        assert gap.shape == (N,) and gap.mean() > 3 * gap.std() / N**0.5
        gaps.append(float(gap.mean()))
    assert gaps[0] > 1.5 * gaps[1] > 1.5**2 * gaps[2], gaps


def test_bits_per_dimension_belong_to_pixels():
    nats = torch.tensor([8 * 12 * math.log(2)])
    assert torch.allclose(bits_per_dimension(nats, 12, "patches"), torch.tensor([8.0]))
    with pytest.raises(ValueError, match="'latents'"):
        bits_per_dimension(torch.ones(1), 12, "latents")


def test_semantic_breaks_are_noticed(monkeypatch):
    """min_snr that clips from below, and a KL without its factor 1/2."""
    with monkeypatch.context() as broken:
        broken.setitem(LOSS_WEIGHTS, "min_snr", lambda snr, gamma: snr.clamp(min=gamma))
        with pytest.raises(AssertionError):
            test_training_loss_agrees_for_all_prediction_types("min_snr", 5.0)
    right = posterior_kl
    monkeypatch.setitem(globals(), "posterior_kl", lambda *arguments: 2 * right(*arguments))
    with pytest.raises(AssertionError):
        test_posterior_kl_matches_torch(500, 400, "fixed_large")
