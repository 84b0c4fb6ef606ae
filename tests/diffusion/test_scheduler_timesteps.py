"""The plan of a sampling run: spacing, custom timesteps and what follows each."""

import warnings

import diffusers
import pytest
import torch
from scheduling import make, ramp, rng

from pipeline.diffusion.scheduler import (
    TIMESTEP_SPACINGS,
    DDPMScheduler,
)


@pytest.mark.filterwarnings("ignore:.*is no pure noise")
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_set_timesteps_matches_diffusers(spacing):
    """Except that theirs ends 62 trailing plans with an extra -1 and begins one step at 0."""
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


def test_previous_timestep_follows_custom_timesteps():
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
def test_set_timesteps_refuses_impossible_plans(arguments, message):
    with pytest.raises(ValueError, match=message):
        make().set_timesteps(**arguments)


@pytest.mark.parametrize("n", [7, 50, 600, 1000])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_set_timesteps_starts_at_the_last_timestep(spacing, n):
    """B3."""
    scheduler = make(timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    assert scheduler.timesteps[0] == 999 and len(scheduler.timesteps) == n


def test_set_timesteps_warns_if_leading_starts_from_an_image():
    """B3."""
    with pytest.warns(UserWarning, match="t=599"):
        make().set_timesteps(600)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make().set_timesteps(50)


def test_step_names_a_timestep_outside_the_plan():
    """B8."""
    scheduler, x = make(), ramp()
    scheduler.set_timesteps(50)
    with pytest.raises(ValueError, match="timestep 13 "):
        scheduler.step(x, 13, x)
    assert scheduler.step(x, 13, x, rng(), previous_timestep=7).prev_sample.isfinite().all()
    for t in (1000, -2, torch.tensor([1000]), torch.tensor(-2)):
        with pytest.raises(ValueError, match=r"\[-1, 999\]"):
            scheduler.abar(t, x)
