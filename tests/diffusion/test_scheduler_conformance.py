"""What diffusers asks of a scheduler (S1-S27), and what its own schedulers get wrong (B1-B12)."""

import inspect
import itertools
import re
import threading
import warnings

import diffusers
import numpy as np
import pytest
import torch

from pipeline.diffusion.scheduler import (
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    VARIANCE_TYPES,
    DDPMScheduler,
)

REFERENCE = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "variance_type": "fixed_small",
    "clip_sample": True,
}
quiet = pytest.mark.filterwarnings("ignore::UserWarning")


def make(**changes):
    return DDPMScheduler(**{**REFERENCE, **changes})


def ramp(flip=False):
    """(4, 3, 8, 8), the values k / 768 in diffusers' own order."""
    values = torch.arange(768).flip(-1) if flip else torch.arange(768)
    return (values.reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)


def toy_network(x, t):
    return x * t / (t + 1)


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_survives_saving(folder, t=None, **changes):
    """At t, or at the last step and at one in the middle, where every setting has its influence; the outputs are out of range."""
    ours, x = make(**changes), torch.rand(4, 3, 8, 8, generator=noise(1))
    ours.save_config(folder)
    loaded = DDPMScheduler.from_pretrained(folder)
    assert len(loaded) == len(ours)
    for each in (0, len(ours) // 2) if t is None else (t,):
        a, b = (s.step(3 * x, each, x, generator=noise()).prev_sample for s in (ours, loaded))
        assert a.isfinite().all() and (a - b).abs().sum() < 1e-5


ROUND_TRIPS = [
    *[{"num_train_timesteps": T} for T in (1, 5, 100, 1000)],  # S1
    *[
        {"beta_start": a, "beta_end": b} for a, b in [(1e-4, 0.002), (0.001, 0.02), (0.01, 0.2)]
    ],  # S2
    *[{"beta_schedule": s} for s in ("linear", "squaredcos_cap_v2")],  # S3
    *[{"variance_type": v} for v in ("fixed_small", "fixed_large")],  # S4
    *[{"clip_sample": c} for c in (True, False)],  # S5
    {"thresholding": False},  # S6
    *[
        {"thresholding": True, "sample_max_value": m, "prediction_type": p}
        for m in (0.5, 1, 2)
        for p in PREDICTION_TYPES
    ],
    *[{"prediction_type": p} for p in PREDICTION_TYPES],  # S7
    *[{"t": t} for t in (0, 500, 999)],  # S8
    *[{"rescale_betas_zero_snr": z} for z in (True, False)],  # S10
]


@quiet
@pytest.mark.parametrize("changes", ROUND_TRIPS, ids=str)
def test_saved_and_loaded_schedulers_step_alike(changes, tmp_path):
    """S1-S8 and S10."""
    assert_survives_saving(tmp_path, **changes)


@pytest.mark.parametrize("t, variance", [(0, 0.0), (487, 0.00979), (999, 0.02)])
def test_variance_has_diffusers_reference_values(t, variance):
    """S9."""
    assert abs(float(make()._get_variance(t)) - variance) < 1e-5


@pytest.mark.parametrize(
    "prediction, total, mean", [("epsilon", 258.9606, 0.3372), ("v_prediction", 202.0296, 0.2631)]
)
def test_full_loop_without_a_plan_has_diffusers_sums(prediction, total, mean):
    """S11, S12, traps 1 and 2."""
    scheduler, x, generator = make(prediction_type=prediction), ramp(), noise()
    for t in reversed(range(len(scheduler))):
        x = scheduler.step(toy_network(x, t), t, x, generator=generator).prev_sample
    assert abs(x.abs().sum() - total) < 1e-2 and abs(x.abs().mean() - mean) < 1e-3


def test_full_loop_from_a_noised_image_has_diffusers_sums():
    """S13, trap 1: the sum holds only with abar read in float32 before the arithmetic."""
    scheduler, generator = make(), noise()
    plan = scheduler.timesteps[998:]
    x = scheduler.add_noise(ramp(), ramp(flip=True), plan[:1])
    for t in plan:
        x = scheduler.step(toy_network(x, t), t, x, generator=generator).prev_sample
    assert abs(x.abs().sum() - 387.9466) < 1e-2 and abs(x.abs().mean() - 0.5051) < 1e-3


def test_custom_timesteps_follow_each_other():
    """S14."""
    scheduler, plan = make(), [100, 87, 50, 1, 0]
    scheduler.set_timesteps(timesteps=plan)
    assert [scheduler.previous_timestep(t).item() for t in scheduler.timesteps] == [
        87,
        50,
        1,
        0,
        -1,
    ]


def test_each_example_goes_on_from_its_own_timestep_of_the_plan():
    """As where `previous_timestep` names what follows."""
    scheduler, x = make(), ramp()
    scheduler.set_timesteps(timesteps=[900, 500, 20, 10])
    t, s = torch.tensor([20, 900, 10, 500]), torch.tensor([10, 500, -1, 20])
    a, b = (
        scheduler.step(0.1 * x, t, x, [noise(i) for i in range(4)], **more).prev_sample
        for more in ({}, {"previous_timestep": s})
    )
    assert torch.equal(a, b) and torch.equal(scheduler.previous_timestep(t), s)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"timesteps": [100, 87, 50, 51, 0]}, "decreasing order"),  # S15
        ({"num_inference_steps": 5, "timesteps": [100, 87, 50, 1, 0]}, "got both"),  # S16
        ({"timesteps": [1000]}, r"\[0, 999\]"),  # S17
        ({"timesteps": [5, -1]}, r"\[0, 999\]"),
        ({"timesteps": []}, "decreasing order"),
        ({"num_inference_steps": 0}, "from 1 to 1000"),
        ({"num_inference_steps": 1001}, "from 1 to 1000"),
        ({"num_inference_steps": 2.5}, "from 1 to 1000"),
        ({}, "from 1 to 1000"),
    ],
)
def test_impossible_plans_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make().set_timesteps(**arguments)


def test_loaded_scheduler_steps_alike_on_a_plan(tmp_path):
    """S18."""
    ours, x = make(), torch.rand(4, 3, 8, 8, generator=noise(1))
    ours.save_config(tmp_path)
    loaded = DDPMScheduler.from_pretrained(tmp_path)
    ours.set_timesteps(50), loaded.set_timesteps(50)
    a, b = (
        s.step(0.1 * x, ours.timesteps[0], x, generator=noise()).prev_sample for s in (ours, loaded)
    )
    assert (a - b).abs().sum() < 1e-5


def test_config_travels_through_every_scheduler_of_the_family():
    """S19."""
    ours = make()
    family = [
        getattr(diffusers, name)
        for name in DDPMScheduler._compatibles
        if name != "DPMSolverSDEScheduler"
    ]
    needs = {"LMSDiscreteScheduler": "scipy"}
    for theirs in family:
        if theirs.__name__ in needs and not diffusers.utils.is_scipy_available():
            continue
        back = DDPMScheduler.from_config(theirs.from_config(ours.config).config)
        assert {k: back.config[k] for k in ours.config} == dict(ours.config), theirs.__name__


@pytest.mark.parametrize("rescaled", [False, True])
def test_every_stock_scheduler_takes_a_schedule_that_it_does_not_compute(tmp_path, rescaled):
    """diffusers computes `sigmoid` in its DDPMScheduler alone; the others raise where the configuration has no betas."""
    ours = make(
        beta_schedule="sigmoid", prediction_type="v_prediction", rescale_betas_zero_snr=rescaled
    )
    ours.save_pretrained(tmp_path)
    for again in (DDPMScheduler.from_pretrained(tmp_path), DDPMScheduler.from_config(ours.config)):
        assert torch.equal(
            *(s.abar(s.timesteps, torch.zeros(1, dtype=torch.float64)) for s in (again, ours))
        )
    made = 0
    for kind in (getattr(diffusers, name) for name in DDPMScheduler._compatibles):
        if kind.__name__ in ("DPMSolverSDEScheduler", "EDMEulerScheduler", "LMSDiscreteScheduler"):
            continue  # which need torchsde, have no betas, and need scipy
        knows = "rescale_betas_zero_snr" in inspect.signature(kind.__init__).parameters
        for theirs in (kind.from_pretrained(tmp_path), kind.from_config(ours.config)):
            if knows or not rescaled:
                a, b = (
                    s.alphas_cumprod[:-1] for s in (ours, theirs)
                )  # some replace a last 0 by something they can divide by
                assert (a - b).abs().max() < 1e-6, kind.__name__
                made += 1
    assert made >= (10 if rescaled else 20)


def test_saved_config_is_the_config(tmp_path):
    """S20."""
    ours = make()
    ours.save_pretrained(tmp_path)
    config = dict(ours.config)
    del config["_use_default_values"]
    assert DDPMScheduler.from_pretrained(tmp_path).config == config


def test_step_keeps_the_shape_and_answers_as_tuple_or_output():
    """S21, S22."""
    scheduler, x = make(), torch.rand(4, 3, 8, 8, generator=noise(1))
    scheduler.set_timesteps(50)
    for t in scheduler.timesteps[:2]:
        out = scheduler.step(0.1 * x, t, x, generator=noise())
        pair = scheduler.step(0.1 * x, t, x, generator=noise(), return_dict=False)
        assert out.prev_sample.shape == x.shape and isinstance(pair, tuple)
        assert torch.equal(pair[0], out.prev_sample) and torch.equal(
            pair[1], out.pred_original_sample
        )


def test_public_surface():
    """S23, S24, S25 and len."""
    scheduler, x = make(), torch.rand(4, 3, 8, 8, generator=noise(1))
    scheduler.set_timesteps(50)
    assert scheduler.init_noise_sigma == 1 and scheduler.order == 1 and len(scheduler) == 1000
    assert torch.equal(scheduler.scale_model_input(x, 0.0), x)
    assert scheduler.add_noise(x, x, scheduler.timesteps[5][None]).shape == x.shape
    assert "kwargs" not in inspect.signature(DDPMScheduler.__init__).parameters


@quiet
def test_trained_betas_survive_saving_exactly(tmp_path):
    """S26."""
    ours = make(trained_betas=np.array([0.1, 0.3]))
    ours.save_pretrained(tmp_path)
    loaded = DDPMScheduler.from_pretrained(tmp_path)
    assert torch.equal(loaded.betas, torch.tensor([0.1, 0.3])) and len(loaded) == 2
    assert torch.allclose(
        loaded.abar(torch.tensor([-1, 0, 1]), torch.zeros(3)), torch.tensor([1, 0.9, 0.63])
    )


def test_attributes_are_found_or_refused_as_in_diffusers():
    """S27."""
    scheduler = make()
    with pytest.raises(
        AttributeError, match="'DDPMScheduler' object has no attribute 'does_not_exist'"
    ):
        scheduler.does_not_exist  # noqa: B018
    with pytest.warns(FutureWarning, match="beta_start"):
        assert scheduler.beta_start == 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(scheduler.timesteps) == 1000


def test_constructor_defaults_are_diffusers_own():
    ours, theirs = (
        inspect.signature(c.__init__).parameters for c in (DDPMScheduler, diffusers.DDPMScheduler)
    )
    assert {k: p.default for k, p in ours.items()} == {k: p.default for k, p in theirs.items()}


@quiet
@pytest.mark.parametrize(
    "changes",
    [
        {"beta_end": 2},
        {"beta_start": 0},
        {"beta_schedule": "laplace"},
        {"variance_type": "other"},
        {"variance_type": "learned"},
        {"variance_type": "learned_range"},
        {"prediction_type": "noise"},
        {"timestep_spacing": "uniform"},
        {"num_train_timesteps": 0},
    ],
    ids=str,
)
def test_values_that_are_not_implemented_are_refused_by_name(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        make(**changes)


@quiet
def test_stock_pipeline_draws_the_reference_picture():
    """diffusers' DDPMPipeline over our scheduler, a random UNet and 2 steps."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipe = diffusers.DDPMPipeline(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    image = pipe(generator=noise(), num_inference_steps=2, output_type="np").images
    corner = [0.0, 0.9996672, 0.00329116, 1.0, 0.9995991, 1.0, 0.0060907, 0.00115037, 0.0]
    assert np.abs(image[0, -3:, -3:, -1].flatten() - corner).max() < 1e-2


# -- B1-B12 ----------------------------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_log_variances_are_the_plain_ones_and_all_is_finite(spacing, prediction):
    """B1."""
    ends = {}
    for variance in VARIANCE_TYPES:
        scheduler = make(
            variance_type=variance, timestep_spacing=spacing, prediction_type=prediction
        )
        scheduler.set_timesteps(7)
        x, generator = ramp(), noise()
        for t in scheduler.timesteps:
            x = scheduler.step(toy_network(x, t), t, x, generator=generator).prev_sample
        assert x.isfinite().all()
        ends[variance] = x
    assert torch.equal(ends["fixed_small"], ends["fixed_small_log"])
    assert torch.equal(ends["fixed_large"], ends["fixed_large_log"])


@quiet
@pytest.mark.parametrize("variance", VARIANCE_TYPES)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_last_step_with_the_true_noise_gives_the_clean_image(spacing, variance):
    """B2; diffusers leaves a standard deviation of 0.17 with trailing and fixed_large."""
    scheduler = make(variance_type=variance, timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(50)
    t, x_0, eps = (
        scheduler.timesteps[-1],
        2 * ramp() - 1,
        torch.randn(4, 3, 8, 8, generator=noise(2)),
    )
    out = scheduler.step(eps, t, scheduler.add_noise(x_0, eps, t), generator=noise()).prev_sample
    assert (out - x_0).abs().max() < 1e-4


@pytest.mark.parametrize("variance", VARIANCE_TYPES)
def test_the_transition_to_the_clean_image_is_certain(variance):
    """B2, as the bound and any other reader of `transition` see it, for one timestep and for one per example."""
    scheduler, x_0 = make(variance_type=variance), 2 * ramp() - 1
    x_t = scheduler.add_noise(x_0, torch.randn(x_0.shape, generator=noise()), 19)
    for t, s in ((19, -1), (torch.full((len(x_0),), 19), torch.full((len(x_0),), -1))):
        mean, variance_s = scheduler.transition(x_0, x_t, t, s)
        assert not variance_s.any() and torch.allclose(mean.to(x_0.dtype), x_0, atol=1e-6)


@pytest.mark.parametrize("n", [7, 50, 600, 1000])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_trailing_and_linspace_start_at_the_last_timestep(spacing, n):
    """B3."""
    scheduler = make(timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    assert scheduler.timesteps[0] == 999 and len(scheduler.timesteps) == n


def test_leading_warns_when_it_starts_from_an_image():
    """B3."""
    with pytest.warns(UserWarning, match="t=599"):
        make().set_timesteps(600)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make().set_timesteps(50)


def test_zero_terminal_snr_cannot_predict_noise():
    """B4."""
    with pytest.warns(UserWarning, match="zero terminal SNR"):
        scheduler = make(rescale_betas_zero_snr=True)
    x = ramp()
    for t in (999, torch.tensor([3, 999, 5, 6])):
        with pytest.raises(ValueError, match="abar_t = 0"):
            scheduler.step(x, t, x)
    assert scheduler.step(x, 998, x, generator=noise()).prev_sample.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x_s = make(rescale_betas_zero_snr=True, prediction_type="v_prediction").step(
            x, 999, x, generator=noise()
        )
    assert x_s.prev_sample.isfinite().all()


def test_dynamic_thresholding_rescales_and_a_maximum_of_one_warns():
    """B5: an image is divided by its own 0.995-quantile where that is above 1."""
    x_0 = torch.linspace(-3, 3, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    x_0[1] *= 0.1
    out = make(thresholding=True, sample_max_value=None, prediction_type="sample").clip(x_0)
    size = np.quantile(x_0[0].abs().numpy(), 0.995)
    assert size > 2.9 and np.allclose(
        out[0], np.clip(x_0[0].numpy(), -size, size) / size, atol=1e-6
    )
    assert torch.equal(out[1], x_0[1]) and not torch.allclose(out[0], x_0[0].clamp(-1, 1))
    with pytest.warns(UserWarning, match="plain clamp"):
        clamp = make(thresholding=True).clip(x_0)
    assert torch.equal(clamp, x_0.clamp(-1, 1))
    with pytest.warns(UserWarning, match=r"sample_max_value=0.5 clamps to it and divides by it"):
        assert torch.equal(
            make(thresholding=True, sample_max_value=0.5).clip(x_0), x_0.clamp(-0.5, 0.5) / 0.5
        )


def test_noise_level_in_bfloat16_is_right_at_every_timestep():
    """B6; with coefficients in bfloat16 sigma is 0 for ten timesteps."""
    scheduler, ones = make(), torch.ones(1000, 1, dtype=torch.bfloat16)
    sigma = scheduler.add_noise(0 * ones, ones, torch.arange(1000)).double().flatten()
    exact = (1 - np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))) ** 0.5
    assert np.abs(sigma.numpy() / exact - 1).max() < 1e-2


@pytest.mark.parametrize(
    "variance, eta", [("fixed_large", 1.0), *[("fixed_small", eta) for eta in (1.0, 0.3, 0.0)]]
)
def test_one_timestep_per_example_equals_one_example_at_a_time(variance, eta):
    """B7, with one generator an image and an image that is already at its last step."""
    scheduler, x = make(variance_type=variance), torch.randn(4, 3, 8, 8, generator=noise(3))
    eps = torch.randn(4, 3, 8, 8, generator=noise(4))
    t, s = torch.tensor([999, 500, 20, 10]), torch.tensor([900, 499, 0, -1])
    generators = [noise(i) for i in range(4)]
    together = scheduler.step(eps, t, x, generators, eta=eta, previous_timestep=s).prev_sample
    for i in range(4):
        alone = scheduler.step(
            eps[i : i + 1], int(t[i]), x[i : i + 1], noise(i), eta=eta, previous_timestep=int(s[i])
        )
        assert torch.allclose(together[i : i + 1], alone.prev_sample, atol=1e-6)


def test_timestep_outside_the_plan_is_named():
    """B8."""
    scheduler, x = make(), ramp()
    scheduler.set_timesteps(50)
    with pytest.raises(ValueError, match="13 is not in the plan"):
        scheduler.step(x, 13, x)
    assert scheduler.step(x, 13, x, noise(), previous_timestep=7).prev_sample.isfinite().all()
    for t in (1000, -2, torch.tensor([1000]), torch.tensor(-2)):
        with pytest.raises(ValueError, match=r"\[-1, 999\]"):
            scheduler.abar(t, x)


def test_short_chain_warns_and_the_named_range_ends_in_noise():
    """B11."""
    with pytest.warns(UserWarning, match="abar = 0.364") as caught:
        make(num_train_timesteps=100)
    start, end = map(
        float,
        re.search(r"beta_start=([\d.e-]+), beta_end=([\d.e-]+)", str(caught[0].message)).groups(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cured = make(num_train_timesteps=100, beta_start=start, beta_end=end)
    assert cured.abar(99, torch.zeros(1)) < 1e-3


def test_threads_on_one_scheduler_do_not_disturb_each_other():
    """B12: with explicit plans `step` keeps no state."""
    scheduler = make()

    def chain(n, seed):
        x, generator, plan = ramp(), noise(seed), [*range(999, 0, -(999 // n)), -1]
        for t, s in itertools.pairwise(plan):
            x = scheduler.step(toy_network(x, t), t, x, generator, previous_timestep=s).prev_sample
        return x

    alone, together = [chain(n, n) for n in (40, 60)], {}
    threads = [
        threading.Thread(target=lambda n=n: together.update({n: chain(n, n)})) for n in (40, 60)
    ]
    [t.start() for t in threads], [t.join() for t in threads]
    assert torch.equal(alone[0], together[40]) and torch.equal(alone[1], together[60])


@pytest.mark.parametrize("options, message", [({"eta": -0.1}, "eta"), ({"eta": 1.1}, "eta")])
def test_eta_outside_its_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make().step(ramp(), 5, ramp(), **options)


def test_what_step_cannot_use_is_refused():
    with pytest.raises(ValueError, match="fixed_small"):
        make(variance_type="fixed_large").step(ramp(), 5, ramp(), eta=0.5)
    with pytest.raises(ValueError, match="needs variance_type='fixed_small', got 'fixed_large'"):
        make(variance_type="fixed_large").transition(ramp(), ramp(), 1, 0, eta=0.99)
    with pytest.raises(ValueError, match="rescale_betas_zero_snr needs at least 2 timesteps"):
        make(num_train_timesteps=1, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="from trained_betas"):
        make(trained_betas=[1.5, 0.2])
    with pytest.raises(ValueError, match="trained_betas must be at least 1 beta, got none"):
        make(trained_betas=[])
    with pytest.raises(
        ValueError,
        match="previous_timestep must lie before timestep where eta is above 0, got 7 and 5",
    ):
        make().step(ramp(), 5, ramp(), previous_timestep=7)
    assert torch.isfinite(
        make().step(ramp(), 5, ramp(), previous_timestep=7, eta=0.0).prev_sample
    ).all(), "DDIM's inversion"
    with pytest.raises(ValueError, match="learned variances"):
        make().step(torch.cat([ramp(), ramp()], 1), 5, ramp())
