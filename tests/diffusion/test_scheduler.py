"""The equations of the noise process against oracles that know nothing of its code."""

import itertools

import diffusers
import numpy as np
import pytest
import torch

from pipeline.diffusion import losses
from pipeline.diffusion.guidance import guide
from pipeline.diffusion.scheduler import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    DDPMScheduler,
)

F64 = torch.float64
PAIRS = [(999, 998), (999, 0), (500, 499), (500, 250), (1, 0), (20, 3)]
STANDARD = {"clip_sample": False, "timestep_spacing": "trailing"}


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=noise(seed), dtype=dtype)


def abar_of_the_linear_schedule(t):
    """abar at library time t, from the definitions of beta and (4)."""
    return np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: t + 1])


# -- forwards --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("T", [1000, 100])
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_schedules_are_those_of_diffusers(schedule, T, zero):
    config = {"beta_schedule": schedule, "num_train_timesteps": T, "rescale_betas_zero_snr": zero}
    ours, theirs = DDPMScheduler(**config), diffusers.DDPMScheduler(**config)
    torch.testing.assert_close(
        ours.betas, theirs.betas, rtol=2e-3, atol=1e-6
    )  # theirs carries float32 cancellation
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    assert not zero or ours.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_abar_is_the_product_of_the_alphas(t):
    """(4), and the slide's brace: abar is the product, not its root. The clean image has abar = 1."""
    abar = DDPMScheduler().abar(t, normal(1))
    assert abs(float(abar) / abar_of_the_linear_schedule(t) - 1) < 1e-12
    assert abs(float(abar) / abar_of_the_linear_schedule(t) ** 0.5 - 1) > 4e-5
    assert DDPMScheduler().abar(-1, normal(1)) == 1


def test_chain_of_single_steps_has_the_moments_of_the_direct_jump():
    """(1)-(5): mean sqrt(abar) x_0 and variance 1 - abar (not its root, the slide's slip), by Monte-Carlo."""
    scheduler, N, x_0, generator = DDPMScheduler(), 40_000, 1.5, noise()
    x = torch.full((N,), x_0, dtype=F64)
    for t in range(300):
        x = scheduler.add_noise_step(x, torch.randn(N, generator=generator, dtype=F64), t)
    jump = scheduler.add_noise(torch.full((N,), x_0, dtype=F64), normal(N, seed=1), 299)
    abar = abar_of_the_linear_schedule(299)
    for sample in (x, jump):
        assert abs(sample.mean() - abar**0.5 * x_0) < 4 * ((1 - abar) / N) ** 0.5
        assert abs(sample.var() / (1 - abar) - 1) < 4 * (2 / N) ** 0.5
        assert abs(sample.var() / (1 - abar) ** 0.5 - 1) > 0.1


def test_variance_is_preserved_per_dimension():
    """(2): E‖x_t‖² / d stays 1 along the chain; the slide's E‖eps‖² = 1 would be off by the factor d."""
    scheduler, d, x, generator = DDPMScheduler(), 100_000, normal(1, 100_000).sign(), noise(1)
    for t in range(0, 1000, 50):
        x = scheduler.add_noise_step(x, torch.randn(x.shape, generator=generator, dtype=F64), t)
        assert abs(x.square().sum() / d - 1) < 4 * (2 / d) ** 0.5


def test_two_independent_steps_add_like_one_long_step():
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


def test_end_state_is_noise():
    """(6): nothing of the image is left at T."""
    abar = DDPMScheduler().abar(999, normal(1))
    assert (
        0 < abar < 1e-4
        and abs(float(DDPMScheduler().snr(999, normal(1))) - float(abar / (1 - abar))) < 1e-12
    )


# -- backwards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t, s", PAIRS)
def test_posterior_is_bayes_rule_for_two_gaussians(t, s):
    """(7)-(9), B9: prior q(x_s | x_0), likelihood q(x_t | x_s), multiplied by hand."""
    abar_t, abar_s = abar_of_the_linear_schedule(t), abar_of_the_linear_schedule(s)
    alpha = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[s + 1 : t + 1])
    x_0, x_t = normal(3, 5), normal(3, 5, seed=1)
    precision = 1 / (1 - abar_s) + alpha / (1 - alpha)
    expected = (abar_s**0.5 * x_0 / (1 - abar_s) + alpha**0.5 * x_t / (1 - alpha)) / precision
    mean, variance = DDPMScheduler().posterior(x_0, x_t, t, s)
    torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-12)
    assert abs(float(variance) * precision - 1) < 1e-10
    assert abs(alpha * abar_s / abar_t - 1) < 1e-12


def test_posterior_is_what_simulation_shows():
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


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_every_prediction_gives_back_the_image_and_the_noise(prediction):
    """(15) and its relatives, for one timestep per example."""
    scheduler, t = DDPMScheduler(prediction_type=prediction), torch.tensor([0, 10, 500, 999])
    x_0, eps = normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1)
    x_t = scheduler.add_noise(x_0, eps, t)
    output = {"epsilon": eps, "sample": x_0, "v_prediction": scheduler.get_velocity(x_0, eps, t)}[
        prediction
    ]
    torch.testing.assert_close(scheduler.predict_x_0(output, t, x_t), x_0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scheduler.predict_eps(x_0, x_t, t), eps, rtol=1e-10, atol=1e-10)


def test_velocity_is_the_derivative_along_the_circle():
    """x_t = cos(phi) x_0 + sin(phi) eps, v = dx/dphi, by central differences."""
    x_0, eps, t = normal(2, 5), normal(2, 5, seed=1), 300
    phi, h = np.arccos(abar_of_the_linear_schedule(t) ** 0.5), 1e-5
    x = [np.cos(phi + d) * x_0 + np.sin(phi + d) * eps for d in (-h, h)]
    torch.testing.assert_close(
        DDPMScheduler().get_velocity(x_0, eps, t), (x[1] - x[0]) / (2 * h), rtol=1e-8, atol=1e-8
    )


def test_half_precision_samples_are_computed_in_float32():
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
    assert (
        scheduler.step(low[0], 500, low[1], generator=noise()).prev_sample.dtype == torch.bfloat16
    )
    for eta in (0.0, 0.5):
        steps = (500, 499), (torch.tensor([500, 500]), torch.tensor([499, 499]))
        one, each = (scheduler.transition(*low, t, s, eta=eta)[0] for t, s in steps)
        torch.testing.assert_close(one, each, rtol=1e-5, atol=1e-5)


# -- against diffusers -----------------------------------------------------------------------------------------------


def round_off(t):
    """What float32 leaves of 1 - abar, whose relative error is 2^-24 / (1 - abar), on samples of up to 4."""
    return 2e-5 + 4 * 2**-24 / (1 - abar_of_the_linear_schedule(t))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("n", [1000, 50, 7])
def test_every_step_is_that_of_diffusers(n, spacing, variance, prediction, clip):
    """(16): same generator, same x_t; fixed_large's last step adds noise there and none here."""
    config = {
        "timestep_spacing": spacing,
        "variance_type": variance,
        "prediction_type": prediction,
        "clip_sample": clip,
    }
    ours, theirs = DDPMScheduler(**config), diffusers.DDPMScheduler(**config)
    ours.set_timesteps(n), theirs.set_timesteps(n)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    x, generators, last = (
        normal(2, 3, 4, 4, dtype=torch.float32),
        (noise(), noise()),
        int(ours.timesteps[-1]),
    )
    plan = ours.timesteps.tolist() if n < 1000 else [*range(999, 10, -37), *range(10, -1, -1)]
    for t in plan:
        output = normal(2, 3, 4, 4, seed=t, dtype=torch.float32)
        if t == last and t > 0 and variance == "fixed_large":
            break
        a = ours.step(output, t, x, generator=generators[0])
        b = theirs.step(output, t, x, generator=generators[1])
        torch.testing.assert_close(a.prev_sample, b.prev_sample, rtol=1e-4, atol=round_off(t))
        torch.testing.assert_close(
            a.pred_original_sample, b.pred_original_sample, rtol=1e-4, atol=1e-4
        )
        x = b.prev_sample.clamp(-3, 3)
    if last == 0:  # theirs draws, and multiplies by nothing, where a plan ends above 0
        assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.filterwarnings("ignore:.*is no pure noise")
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_every_plan_is_that_of_diffusers(spacing):
    """To the last half; but theirs has a timestep -1 too many in 62 of the trailing ones, and begins a single step at 0."""
    ours, theirs = (
        DDPMScheduler(timestep_spacing=spacing),
        diffusers.DDPMScheduler(timestep_spacing=spacing),
    )
    for n in range(2, 1001):
        ours.set_timesteps(n), theirs.set_timesteps(n)
        assert len(ours.timesteps) == n and theirs.timesteps[n:].tolist() in ([], [-1])
        assert torch.equal(ours.timesteps, theirs.timesteps[:n]), n
    ours.set_timesteps(1)
    assert spacing == "leading" or ours.timesteps.tolist() == [999]


@pytest.mark.parametrize(
    "config",
    [
        {"clip_sample_range": 0.5},
        {"clip_sample_range": 2.0},
        {"thresholding": True, "sample_max_value": 3.0},
        {"thresholding": True, "sample_max_value": 50.0, "dynamic_thresholding_ratio": 0.8},
    ],
    ids=str,
)
def test_x_0_is_kept_in_range_as_by_diffusers(config):
    ours, theirs = DDPMScheduler(**config), diffusers.DDPMScheduler(**config)
    x = normal(2, 3, 4, 4, dtype=torch.float32)
    for t in (999, 500, 3):
        output = normal(2, 3, 4, 4, seed=t, dtype=torch.float32)
        a, b = (scheduler.step(output, t, x, generator=noise()) for scheduler in (ours, theirs))
        torch.testing.assert_close(a.prev_sample, b.prev_sample, rtol=1e-4, atol=round_off(t))
        torch.testing.assert_close(
            a.pred_original_sample, b.pred_original_sample, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "n, spacing", [(50, "leading"), (7, "leading"), (50, "trailing"), (8, "trailing")]
)
def test_every_ddim_step_is_that_of_diffusers(n, spacing, prediction, clip, eta):
    """(19); its DDIM derives eps from the clipped x_0 only when asked to."""
    config = {"timestep_spacing": spacing, "prediction_type": prediction, "clip_sample": clip}
    ours, theirs = DDPMScheduler(**config), diffusers.DDIMScheduler(**config)
    ours.set_timesteps(n), theirs.set_timesteps(n)
    x, generators = normal(2, 3, 4, 4, dtype=torch.float32), (noise(), noise())
    for t in ours.timesteps.tolist():
        output = normal(2, 3, 4, 4, seed=t, dtype=torch.float32)
        a = ours.step(output, t, x, generator=generators[0], eta=eta).prev_sample
        b = theirs.step(
            output, t, x, eta=eta, use_clipped_model_output=clip, generator=generators[1]
        ).prev_sample
        torch.testing.assert_close(a, b, rtol=1e-4, atol=round_off(t))
        x = b.clamp(-3, 3)


# -- randomness ------------------------------------------------------------------------------------------------------


def test_one_generator_per_image_makes_images_independent_of_their_batch():
    scheduler, x = DDPMScheduler(), normal(3, 3, 4, 4)
    together = scheduler.step(x, 500, x, [noise(i) for i in range(3)]).prev_sample
    for i in range(3):
        assert torch.equal(
            together[i : i + 1],
            scheduler.step(x[i : i + 1], 500, x[i : i + 1], noise(i)).prev_sample,
        )


def test_nothing_is_drawn_where_nothing_is_random():
    scheduler, x, generator = DDPMScheduler(), normal(1, 3, 4, 4), noise()
    before, outside = generator.get_state(), torch.get_rng_state()
    scheduler.step(x, 0, x, generator)
    scheduler.step(x, 500, x, generator, eta=0)
    assert torch.equal(generator.get_state(), before)
    scheduler.step(x, 500, x, generator)
    assert not torch.equal(generator.get_state(), before) and torch.equal(
        torch.get_rng_state(), outside
    )


# -- whole chains, where the answer is known -------------------------------------------------------------------------


def gaussian_eps(x_t, abar, mu, var):
    """The exact E[eps | x_t] of data N(mu, var), by the rule for jointly Gaussian variables."""
    return (1 - abar) ** 0.5 * (x_t - abar**0.5 * mu) / (abar * var + 1 - abar)


def sample(scheduler, eps_hat, x, generator, **options):
    for t in scheduler.timesteps.tolist():
        output = eps_hat(x, abar_of_the_linear_schedule(t))
        x = scheduler.step(output, t, x, generator=generator, **options).prev_sample
    return x


def gaussian_recursion(plan, var, eta=1.0):
    """Variance of the samples of data N(0, var): V <- m² V + variance, each step from (5) and Bayes by hand."""
    V = 1.0
    for t, s in zip(plan, [*plan[1:], -1], strict=True):
        abar_t, abar_s = (
            abar_of_the_linear_schedule(t),
            abar_of_the_linear_schedule(s) if s >= 0 else 1.0,
        )
        noise_slope = (1 - abar_t) ** 0.5 / (abar_t * var + 1 - abar_t)
        x_0_slope = (1 - (1 - abar_t) ** 0.5 * noise_slope) / abar_t**0.5
        beta_tilde = (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)
        m = abar_s**0.5 * x_0_slope + (1 - abar_s - eta**2 * beta_tilde) ** 0.5 * noise_slope
        V = m**2 * V + eta**2 * beta_tilde
    return V


@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("n", [10, 50])
def test_samples_of_gaussian_data_have_the_recursion_s_variance(n, eta):
    """(16), (19); the slide's beta~ z in place of sqrt(beta~) z gives samples far too smooth."""
    scheduler, N, var = DDPMScheduler(**STANDARD), 100_000, 0.25
    scheduler.set_timesteps(n)
    x = sample(scheduler, lambda x, a: gaussian_eps(x, a, 0.0, var), normal(N), noise(1), eta=eta)
    expected = gaussian_recursion(scheduler.timesteps.tolist(), var, eta)
    assert abs(x.mean()) < 4 * (expected / N) ** 0.5
    assert abs(x.var() / expected - 1) < 4 * (2 / N) ** 0.5


def test_bias_of_the_chain_halves_as_the_steps_double():
    """B10: first order in 1/n, on the recursion that the test above ties to the scheduler."""
    bias = []
    for n in (50, 100, 200, 400):
        scheduler = DDPMScheduler(**STANDARD)
        scheduler.set_timesteps(n)
        bias.append(abs(transition_recursion(scheduler, 0.25) - 0.25))
    ratios = [a / b for a, b in itertools.pairwise(bias)]
    assert all(1.7 < ratio < 2.2 for ratio in ratios) and bias[-1] < 0.01, (bias, ratios)


def transition_recursion(scheduler, var):
    """The same variance from the scheduler's own transitions, its mean being linear in x_t."""
    V, plan = 1.0, scheduler.timesteps.tolist()
    x_t = torch.tensor([0.0, 1.0], dtype=F64)
    for t, s in zip(plan, [*plan[1:], -1], strict=True):
        x_0 = scheduler.predict_x_0(
            gaussian_eps(x_t, abar_of_the_linear_schedule(t), 0.0, var), t, x_t
        )
        mean, variance = scheduler.transition(x_0, x_t, t, s)
        V = float((mean[1] - mean[0]) ** 2 * V + variance)
    return V


def test_strided_posteriors_keep_the_marginals():
    """B10: with the true x_0 at hand, any chain of posteriors stays on q(x_s | x_0)."""
    scheduler, N, plan, generator = DDPMScheduler(), 100_000, [999, 700, 300, 40, 3], noise(2)
    x_0 = 2 + 0.5 * normal(N)
    x = scheduler.add_noise(x_0, normal(N, seed=1), plan[0])
    for t, s in itertools.pairwise(plan):
        mean, variance = scheduler.posterior(x_0, x, t, s)
        x = mean + variance.sqrt() * torch.randn(N, generator=generator, dtype=F64)
        abar = abar_of_the_linear_schedule(s)
        expected = abar * 0.25 + 1 - abar
        assert abs(x.mean() - 2 * abar**0.5) < 4 * (expected / N) ** 0.5
        assert abs(x.var() / expected - 1) < 4 * (2 / N) ** 0.5


@pytest.mark.parametrize("w", [-1.0, 0.0, 2.0])
def test_guidance_between_two_gaussians_moves_the_mean(w):
    """(17): with equal covariances the samples' mean is (1 + w) mu_c - w mu_empty."""
    scheduler, N, mu_c, mu_empty, var = DDPMScheduler(**STANDARD), 50_000, 0.8, -0.3, 0.25
    scheduler.set_timesteps(100)
    x = sample(
        scheduler,
        lambda x, a: guide(gaussian_eps(x, a, mu_c, var), gaussian_eps(x, a, mu_empty, var), w),
        normal(N),
        noise(1),
    )
    expected = (1 + w) * mu_c - w * mu_empty
    start = abar_of_the_linear_schedule(999) ** 0.5 * abs(expected)  # the chain starts at mean 0
    assert abs(x.mean() - expected) < 4 * (var / N) ** 0.5 + start


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_chain_that_ends_below_float32_walks_on(prediction_type):
    """abar = 1e-47 at its end: 0 in float32, where the ratio of two neighbours would be no number."""
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


def test_samples_of_a_mixture_have_its_weights_means_and_covariances():
    """The exact noise of a Gaussian mixture through (16), within three standard errors plus the chain's own bias."""
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
    x = sample(scheduler, eps_hat, normal(N, 2), noise(1))
    own = (x[:, None] - means).square().sum(-1).argmin(1)
    bias = abs(gaussian_recursion(scheduler.timesteps.tolist(), spread) - spread)
    for k, share in enumerate(weights):
        mine, count = x[own == k], int((own == k).sum())
        assert abs(count / N - share) < 3 * (share * (1 - share) / N) ** 0.5 + 1 / n
        assert (mine.mean(0) - means[k]).abs().max() < 3 * (spread / count) ** 0.5 + bias
        off = (mine.T.cov() - spread * torch.eye(2, dtype=F64)).abs()
        assert off.diag().max() < 3 * spread * (2 / count) ** 0.5 + bias
        assert off[0, 1] < 3 * spread / count**0.5 + bias


def test_deterministic_steps_keep_the_noise():
    """(19) at eta = 0 moves along one line: the same x_0 and the same eps at every level."""
    scheduler, x_0, eps = (
        DDPMScheduler(clip_sample=False),
        normal(2, 3, 4, 4),
        normal(2, 3, 4, 4, seed=1),
    )
    x_t, x_s = (scheduler.add_noise(x_0, eps, t) for t in (800, 100))
    out = scheduler.step(eps, 800, x_t, eta=0, previous_timestep=100).prev_sample
    torch.testing.assert_close(out, x_s, rtol=1e-10, atol=1e-10)
