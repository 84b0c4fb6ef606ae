"""The assertions of diffusers' own scheduler tests (S1-S27), and refused settings."""

import inspect
import re
import warnings

import diffusers
import numpy as np
import pytest
import torch
from scheduling import make, quiet, ramp, rng, toy_network

from pipeline.diffusion.scheduler import (
    PREDICTION_TYPES,
    DDPMScheduler,
)


def assert_survives_saving(folder, t=None, **changes):
    """Compare at t, or at the last step and in the middle, where every setting matters."""
    ours, x = make(**changes), torch.rand(4, 3, 8, 8, generator=rng(1))
    ours.save_config(folder)
    loaded = DDPMScheduler.from_pretrained(folder)
    assert len(loaded) == len(ours)
    for each in (0, len(ours) // 2) if t is None else (t,):
        a, b = (s.step(3 * x, each, x, generator=rng()).prev_sample for s in (ours, loaded))
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
def test_from_pretrained_steps_like_the_original(changes, tmp_path):
    """S1-S8 and S10."""
    assert_survives_saving(tmp_path, **changes)


@pytest.mark.parametrize("t, variance", [(0, 0.0), (487, 0.00979), (999, 0.02)])
def test_get_variance_has_diffusers_values(t, variance):
    """S9."""
    assert abs(float(make()._get_variance(t)) - variance) < 1e-5


@pytest.mark.parametrize(
    "prediction, total, mean", [("epsilon", 258.9606, 0.3372), ("v_prediction", 202.0296, 0.2631)]
)
def test_step_without_a_plan_has_diffusers_sums(prediction, total, mean):
    """S11, S12, traps 1 and 2."""
    scheduler, x, generator = make(prediction_type=prediction), ramp(), rng()
    for t in reversed(range(len(scheduler))):
        x = scheduler.step(toy_network(x, t), t, x, generator=generator).prev_sample
    assert abs(x.abs().sum() - total) < 1e-2 and abs(x.abs().mean() - mean) < 1e-3


def test_step_from_add_noise_has_diffusers_sums():
    """S13, trap 1: the sum holds only with abar read in float32 before the arithmetic."""
    scheduler, generator = make(), rng()
    plan = scheduler.timesteps[998:]
    x = scheduler.add_noise(ramp(), ramp(flip=True), plan[:1])
    for t in plan:
        x = scheduler.step(toy_network(x, t), t, x, generator=generator).prev_sample
    assert abs(x.abs().sum() - 387.9466) < 1e-2 and abs(x.abs().mean() - 0.5051) < 1e-3


@quiet
def test_step_in_stock_pipeline_has_the_reference_image():
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
    image = pipe(generator=rng(), num_inference_steps=2, output_type="np").images
    corner = [0.0, 0.9996672, 0.00329116, 1.0, 0.9995991, 1.0, 0.0060907, 0.00115037, 0.0]
    assert np.abs(image[0, -3:, -3:, -1].flatten() - corner).max() < 1e-2


def test_from_pretrained_steps_alike_on_a_plan(tmp_path):
    """S18."""
    ours, x = make(), torch.rand(4, 3, 8, 8, generator=rng(1))
    ours.save_config(tmp_path)
    loaded = DDPMScheduler.from_pretrained(tmp_path)
    ours.set_timesteps(50), loaded.set_timesteps(50)
    a, b = (
        s.step(0.1 * x, ours.timesteps[0], x, generator=rng()).prev_sample for s in (ours, loaded)
    )
    assert (a - b).abs().sum() < 1e-5


def test_from_config_round_trips_through_stock_schedulers():
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
def test_save_pretrained_sigmoid_loads_in_stock_schedulers(tmp_path, rescaled):
    """Only diffusers' DDPMScheduler computes `sigmoid`; the others need the betas."""
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


def test_from_pretrained_restores_the_config(tmp_path):
    """S20."""
    ours = make()
    ours.save_pretrained(tmp_path)
    config = dict(ours.config)
    del config["_use_default_values"]
    assert DDPMScheduler.from_pretrained(tmp_path).config == config


def test_scheduler_has_diffusers_public_methods():
    """S23, S24, S25 and len."""
    scheduler, x = make(), torch.rand(4, 3, 8, 8, generator=rng(1))
    scheduler.set_timesteps(50)
    assert scheduler.init_noise_sigma == 1 and scheduler.order == 1 and len(scheduler) == 1000
    assert torch.equal(scheduler.scale_model_input(x, 0.0), x)
    assert scheduler.add_noise(x, x, scheduler.timesteps[5][None]).shape == x.shape
    assert "kwargs" not in inspect.signature(DDPMScheduler.__init__).parameters


@quiet
def test_save_pretrained_keeps_trained_betas_exactly(tmp_path):
    """S26."""
    ours = make(trained_betas=np.array([0.1, 0.3]))
    ours.save_pretrained(tmp_path)
    loaded = DDPMScheduler.from_pretrained(tmp_path)
    assert torch.equal(loaded.betas, torch.tensor([0.1, 0.3])) and len(loaded) == 2
    assert torch.allclose(
        loaded.abar(torch.tensor([-1, 0, 1]), torch.zeros(3)), torch.tensor([1, 0.9, 0.63])
    )


def test_getattr_behaves_as_in_diffusers():
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


def test_init_defaults_are_those_of_diffusers():
    ours, theirs = (
        inspect.signature(c.__init__).parameters for c in (DDPMScheduler, diffusers.DDPMScheduler)
    )
    assert {k: p.default for k, p in ours.items()} == {k: p.default for k, p in theirs.items()}


BAD_SETTINGS = [
    ("beta_end=2", {"beta_end": 2}),
    ("beta_start=0", {"beta_start": 0}),
    ("beta_schedule .*'laplace'", {"beta_schedule": "laplace"}),
    ("variance_type .*'other'", {"variance_type": "other"}),
    ("variance_type .*'learned'", {"variance_type": "learned"}),
    ("variance_type .*'learned_range'", {"variance_type": "learned_range"}),
    ("prediction_type .*'noise'", {"prediction_type": "noise"}),
    ("timestep_spacing .*'uniform'", {"timestep_spacing": "uniform"}),
    ("num_train_timesteps=0", {"num_train_timesteps": 0}),
    ("rescale_betas_zero_snr .* 1 ", {"num_train_timesteps": 1, "rescale_betas_zero_snr": True}),
    ("1.5 from trained_betas", {"trained_betas": [1.5, 0.2]}),
    ("0 from trained_betas", {"trained_betas": []}),
]


@quiet
@pytest.mark.parametrize(("offence", "changes"), BAD_SETTINGS)
def test_init_refuses_what_is_not_implemented(offence, changes):
    with pytest.raises(ValueError, match=offence):
        make(**changes)


def test_init_warns_of_short_chains_and_names_a_range():
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
