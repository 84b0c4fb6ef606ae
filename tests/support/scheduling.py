"""Noise, reference schedulers and abar from its definition, for tests of the noise process."""

import numpy as np
import pytest
import torch

from pipeline.diffusion.scheduler import DDPMScheduler

F64 = torch.float64


REFERENCE = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "variance_type": "fixed_small",
    "clip_sample": True,
}


quiet = pytest.mark.filterwarnings("ignore::UserWarning")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=rng(seed), dtype=dtype)


def linear_abar(t):
    """abar at library time t, from the definitions of beta and (4)."""
    return np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: t + 1])


def make(**changes):
    return DDPMScheduler(**{**REFERENCE, **changes})


def ramp(flip=False):
    """(4, 3, 8, 8), the values k / 768 in diffusers' own order."""
    values = torch.arange(768).flip(-1) if flip else torch.arange(768)
    return (values.reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)


def toy_network(x, t):
    return x * t / (t + 1)
