"""One step of (16) and (19), against diffusers and against itself."""

import itertools
import threading
import warnings

import diffusers
import pytest
import torch
from scheduling import linear_abar, make, normal, quiet, ramp, rng, toy_network

from pipeline.diffusion.scheduler import (
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    VARIANCE_TYPES,
    DDPMScheduler,
)


def round_off(t):
    """The float32 error of samples up to 4: 1 - abar has a relative error of 2^-24 / (1 - abar)."""
    return 2e-5 + 4 * 2**-24 / (1 - linear_abar(t))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("n", [1000, 50, 7])
def test_step_matches_diffusers(n, spacing, variance, prediction, clip):
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
        (rng(), rng()),
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
def test_clip_matches_diffusers(config):
    ours, theirs = DDPMScheduler(**config), diffusers.DDPMScheduler(**config)
    x = normal(2, 3, 4, 4, dtype=torch.float32)
    for t in (999, 500, 3):
        output = normal(2, 3, 4, 4, seed=t, dtype=torch.float32)
        a, b = (scheduler.step(output, t, x, generator=rng()) for scheduler in (ours, theirs))
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
def test_step_with_eta_matches_diffusers_ddim(n, spacing, prediction, clip, eta):
    """(19); its DDIM derives eps from the clipped x_0 only when asked to."""
    config = {"timestep_spacing": spacing, "prediction_type": prediction, "clip_sample": clip}
    ours, theirs = DDPMScheduler(**config), diffusers.DDIMScheduler(**config)
    ours.set_timesteps(n), theirs.set_timesteps(n)
    x, generators = normal(2, 3, 4, 4, dtype=torch.float32), (rng(), rng())
    for t in ours.timesteps.tolist():
        output = normal(2, 3, 4, 4, seed=t, dtype=torch.float32)
        a = ours.step(output, t, x, generator=generators[0], eta=eta).prev_sample
        b = theirs.step(
            output, t, x, eta=eta, use_clipped_model_output=clip, generator=generators[1]
        ).prev_sample
        torch.testing.assert_close(a, b, rtol=1e-4, atol=round_off(t))
        x = b.clamp(-3, 3)


def test_step_with_generators_ignores_the_rest_of_the_batch():
    scheduler, x = DDPMScheduler(), normal(3, 3, 4, 4)
    together = scheduler.step(x, 500, x, [rng(i) for i in range(3)]).prev_sample
    for i in range(3):
        assert torch.equal(
            together[i : i + 1],
            scheduler.step(x[i : i + 1], 500, x[i : i + 1], rng(i)).prev_sample,
        )


def test_step_samples_nothing_where_nothing_is_random():
    scheduler, x, generator = DDPMScheduler(), normal(1, 3, 4, 4), rng()
    before, outside = generator.get_state(), torch.get_rng_state()
    scheduler.step(x, 0, x, generator)
    scheduler.step(x, 500, x, generator, eta=0)
    assert torch.equal(generator.get_state(), before)
    scheduler.step(x, 500, x, generator)
    assert not torch.equal(generator.get_state(), before) and torch.equal(
        torch.get_rng_state(), outside
    )


def test_step_at_eta_zero_keeps_the_noise():
    """(19) at eta = 0 moves along one line: the same x_0 and the same eps at every level."""
    scheduler, x_0, eps = (
        DDPMScheduler(clip_sample=False),
        normal(2, 3, 4, 4),
        normal(2, 3, 4, 4, seed=1),
    )
    x_t, x_s = (scheduler.add_noise(x_0, eps, t) for t in (800, 100))
    out = scheduler.step(eps, 800, x_t, eta=0, previous_timestep=100).prev_sample
    torch.testing.assert_close(out, x_s, rtol=1e-10, atol=1e-10)


def test_step_returns_the_same_tuple_and_output():
    """S21, S22."""
    scheduler, x = make(), torch.rand(4, 3, 8, 8, generator=rng(1))
    scheduler.set_timesteps(50)
    for t in scheduler.timesteps[:2]:
        out = scheduler.step(0.1 * x, t, x, generator=rng())
        pair = scheduler.step(0.1 * x, t, x, generator=rng(), return_dict=False)
        assert out.prev_sample.shape == x.shape and isinstance(pair, tuple)
        assert torch.equal(pair[0], out.prev_sample) and torch.equal(
            pair[1], out.pred_original_sample
        )


@pytest.mark.parametrize(
    "variance, eta", [("fixed_large", 1.0), *[("fixed_small", eta) for eta in (1.0, 0.3, 0.0)]]
)
def test_step_with_batched_t_equals_one_at_a_time(variance, eta):
    """B7, with one generator an image and an image that is already at its last step."""
    scheduler, x = make(variance_type=variance), torch.randn(4, 3, 8, 8, generator=rng(3))
    eps = torch.randn(4, 3, 8, 8, generator=rng(4))
    t, s = torch.tensor([999, 500, 20, 10]), torch.tensor([900, 499, 0, -1])
    generators = [rng(i) for i in range(4)]
    together = scheduler.step(eps, t, x, generators, eta=eta, previous_timestep=s).prev_sample
    for i in range(4):
        alone = scheduler.step(
            eps[i : i + 1], int(t[i]), x[i : i + 1], rng(i), eta=eta, previous_timestep=int(s[i])
        )
        assert torch.allclose(together[i : i + 1], alone.prev_sample, atol=1e-6)


def test_step_continues_each_example_from_its_timestep():
    """As where `previous_timestep` names what follows."""
    scheduler, x = make(), ramp()
    scheduler.set_timesteps(timesteps=[900, 500, 20, 10])
    t, s = torch.tensor([20, 900, 10, 500]), torch.tensor([10, 500, -1, 20])
    a, b = (
        scheduler.step(0.1 * x, t, x, [rng(i) for i in range(4)], **more).prev_sample
        for more in ({}, {"previous_timestep": s})
    )
    assert torch.equal(a, b) and torch.equal(scheduler.previous_timestep(t), s)


def test_step_is_safe_for_threads():
    """B12: with explicit plans `step` keeps no state."""
    scheduler = make()

    def chain(n, seed):
        x, generator, plan = ramp(), rng(seed), [*range(999, 0, -(999 // n)), -1]
        for t, s in itertools.pairwise(plan):
            x = scheduler.step(toy_network(x, t), t, x, generator, previous_timestep=s).prev_sample
        return x

    alone, together = [chain(n, n) for n in (40, 60)], {}
    threads = [
        threading.Thread(target=lambda n=n: together.update({n: chain(n, n)})) for n in (40, 60)
    ]
    [t.start() for t in threads], [t.join() for t in threads]
    assert torch.equal(alone[0], together[40]) and torch.equal(alone[1], together[60])


@quiet
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_step_treats_log_variances_as_plain_ones(spacing, prediction):
    """B1."""
    ends = {}
    for variance in VARIANCE_TYPES:
        scheduler = make(
            variance_type=variance, timestep_spacing=spacing, prediction_type=prediction
        )
        scheduler.set_timesteps(7)
        x, generator = ramp(), rng()
        for t in scheduler.timesteps:
            x = scheduler.step(toy_network(x, t), t, x, generator=generator).prev_sample
        assert x.isfinite().all()
        ends[variance] = x
    assert torch.equal(ends["fixed_small"], ends["fixed_small_log"])
    assert torch.equal(ends["fixed_large"], ends["fixed_large_log"])


@quiet
@pytest.mark.parametrize("variance", VARIANCE_TYPES)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_last_step_with_true_noise_returns_the_image(spacing, variance):
    """B2; diffusers leaves a standard deviation of 0.17 with trailing and fixed_large."""
    scheduler = make(variance_type=variance, timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(50)
    t, x_0, eps = (
        scheduler.timesteps[-1],
        2 * ramp() - 1,
        torch.randn(4, 3, 8, 8, generator=rng(2)),
    )
    out = scheduler.step(eps, t, scheduler.add_noise(x_0, eps, t), generator=rng()).prev_sample
    assert (out - x_0).abs().max() < 1e-4


def test_step_refuses_epsilon_at_zero_terminal_snr():
    """B4."""
    with pytest.warns(UserWarning, match="zero terminal SNR"):
        scheduler = make(rescale_betas_zero_snr=True)
    x = ramp()
    for t in (999, torch.tensor([3, 999, 5, 6])):
        with pytest.raises(ValueError, match="abar_t = 0"):
            scheduler.step(x, t, x)
    assert scheduler.step(x, 998, x, generator=rng()).prev_sample.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x_s = make(rescale_betas_zero_snr=True, prediction_type="v_prediction").step(
            x, 999, x, generator=rng()
        )
    assert x_s.prev_sample.isfinite().all()


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_step_refuses_eta_outside_zero_to_one(eta):
    with pytest.raises(ValueError, match=f"eta .*{eta}"):
        make().step(ramp(), 5, ramp(), eta=eta)


@pytest.mark.parametrize("eta", [0.5, 0.99])
def test_transition_refuses_eta_with_fixed_large(eta):
    with pytest.raises(ValueError, match=f"eta={eta} .*fixed_large"):
        make(variance_type="fixed_large").transition(ramp(), ramp(), 1, 0, eta=eta)


def test_step_refuses_to_go_backwards_unless_deterministic():
    with pytest.raises(ValueError, match="7 and 5"):
        make().step(ramp(), 5, ramp(), previous_timestep=7)
    inverted = make().step(ramp(), 5, ramp(), previous_timestep=7, eta=0.0).prev_sample
    assert inverted.isfinite().all(), "DDIM's inversion"


def test_step_refuses_learned_variances():
    with pytest.raises(ValueError, match=r"\(4, 3, 8, 8\).*\(4, 6, 8, 8\)"):
        make().step(torch.cat([ramp(), ramp()], 1), 5, ramp())


def transition_that_ignores_eta(transition, self, x_0, x_t, t, s, eta=1.0):
    return transition(self, x_0, x_t, t, s)


def transition_with_a_deviation_for_variance(transition, self, x_0, x_t, t, s, eta=1.0):
    """The slide's slip: beta~ z in place of sqrt(beta~) z."""
    mean, variance = transition(self, x_0, x_t, t, s, eta)
    return mean, variance**2


@pytest.mark.parametrize(
    "wrong", [transition_that_ignores_eta, transition_with_a_deviation_for_variance]
)
def test_semantic_breaks_of_transition_are_noticed(monkeypatch, wrong):
    transition = DDPMScheduler.transition
    monkeypatch.setattr(DDPMScheduler, "transition", lambda *a: wrong(transition, *a))
    with pytest.raises(AssertionError):
        test_step_with_eta_matches_diffusers_ddim(8, "trailing", "epsilon", True, 0.4)


def test_semantic_breaks_of_clip_are_noticed(monkeypatch):
    monkeypatch.setattr(DDPMScheduler, "clip", lambda self, x_0: x_0)
    with pytest.raises(AssertionError):
        test_clip_matches_diffusers({"clip_sample_range": 0.5})
