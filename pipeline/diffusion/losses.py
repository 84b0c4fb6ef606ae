"""Training objectives and the terms of the variational bound, one value per example.

Numbers in brackets are the equations of docs/equations.md. Every objective is a weight times the
squared error of x_0. LOSS_WEIGHTS holds those weights; `loss_weight` translates them for a network
that predicts eps or v.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from .scheduler import DDPMScheduler

LossWeight: TypeAlias = Callable[[Tensor, float | None], Tensor]

# Weights of the squared error of x_0, as functions of (snr, gamma). In eps terms the first is 1:
# that is (13).
LOSS_WEIGHTS: dict[str, LossWeight] = {
    "simple": lambda snr, gamma: snr,
    "min_snr": lambda snr, gamma: snr.clamp(max=gamma),
    "velocity": lambda snr, gamma: snr + 1,
    "min_velocity": lambda snr, gamma: (snr + 1).clamp(max=gamma),
    "x_0": lambda snr, gamma: torch.ones_like(snr),
}
# Here a bit per dimension is a bit per colour value of the image.
PIXEL_SPACES = ("pixels", "patches")


def network_target(scheduler: DDPMScheduler, x_0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
    """What the network should predict: eps, x_0 or v, by the scheduler's prediction_type."""
    if scheduler.config["prediction_type"] == "epsilon":
        return eps
    if scheduler.config["prediction_type"] == "sample":
        return x_0
    return scheduler.get_velocity(x_0, eps, t)


def loss_weight(
    scheduler: DDPMScheduler, t: Tensor, name: str = "simple", gamma: float | None = None
) -> Tensor:
    """The weight (B,) of the squared error of what the network predicts, for timesteps t (B,).

    The squared error of x_0 is that of eps divided by SNR, and that of v divided by SNR + 1.
    ValueError for an unknown name, a `gamma` that is missing or unused, and for epsilon where SNR =
    0.
    """
    if name not in LOSS_WEIGHTS:
        raise ValueError(f"weighting must be one of {', '.join(LOSS_WEIGHTS)}, got {name!r}")
    clips = name.startswith("min_")
    if clips != (gamma is not None) or (gamma is not None and not 0 < gamma < math.inf):
        needed = "a finite gamma above 0" if clips else "no gamma"
        raise ValueError(f"weighting {name!r} takes {needed}, got gamma={gamma}")
    snr = scheduler.snr(t, torch.zeros(1, device=t.device))
    weight = LOSS_WEIGHTS[name](snr, gamma)
    if scheduler.config["prediction_type"] == "sample":
        return weight
    if scheduler.config["prediction_type"] == "v_prediction":
        return weight / (snr + 1)
    if scheduler.ends_without_signal and (snr == 0).any():
        raise ValueError(
            "prediction_type='epsilon' has no weight where SNR = 0: noise says nothing about x_0. "
            "Train v_prediction or sample, or without rescale_betas_zero_snr."
        )
    return weight / snr


def training_loss(
    scheduler: DDPMScheduler,
    model_output: Tensor,
    x_0: Tensor,
    eps: Tensor,
    t: Tensor,
    weighting: str = "simple",
    gamma: float | None = None,
) -> Tensor:
    """(13) and its weighted relatives (B,): weight times the mean squared error."""
    error = (network_target(scheduler, x_0, eps, t) - model_output).square().flatten(1).mean(1)
    return loss_weight(scheduler, t, weighting, gamma) * error


# -- the variational bound's terms, in nats summed over the dimensions -----------------------------


def posterior_kl(
    scheduler: DDPMScheduler,
    x_0: Tensor,
    x_0_hat: Tensor,
    x_t: Tensor,
    t: int | Tensor,
    s: int | Tensor,
) -> Tensor:
    """(11) KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)) in nats (B,); ValueError at s = -1.

    With fixed_small both variances are beta~ and this is ‖mu~ - mu‖² / (2 beta~). With fixed_large
    the difference of the variances adds to it.
    """
    _refuse_clean(s)
    mean, variance = scheduler.posterior(x_0, x_t, t, s)
    mean_hat, variance_hat = scheduler.transition(x_0_hat, x_t, t, s)
    ratio = variance / variance_hat
    each = (mean - mean_hat).square() / variance_hat + ratio - 1 - ratio.log()
    return each.flatten(1).sum(1) / 2


def kl_noise_weight(
    scheduler: DDPMScheduler, t: int | Tensor, s: int | Tensor, like: Tensor
) -> Tensor:
    """(12) beta² / (2 beta~ alpha (1 - abar_t)), which turns the noise error into (11)."""
    _refuse_clean(s)
    abar_t, abar_s = scheduler.abar(t, like), scheduler.abar(s, like)
    alpha = abar_t / abar_s
    variance = (1 - abar_s) / (1 - abar_t) * (1 - alpha)
    return (1 - alpha) ** 2 / (2 * variance * alpha * (1 - abar_t))


def noise_kl(
    scheduler: DDPMScheduler, eps: Tensor, eps_hat: Tensor, t: int | Tensor, s: int | Tensor
) -> Tensor:
    """(12) the KL of (11) with fixed_small, in nats (B,), from the error in the noise."""
    return (kl_noise_weight(scheduler, t, s, eps) * (eps - eps_hat).square()).flatten(1).sum(1)


def prior_kl(scheduler: DDPMScheduler, x_0: Tensor, t: int) -> Tensor:
    """(6) KL(q(x_t | x_0) ‖ N(0, I)) at the chain's first timestep t, in nats (B,)."""
    abar_t = scheduler.abar(t, x_0)
    return (abar_t * x_0.square() - abar_t - (1 - abar_t).log()).flatten(1).sum(1) / 2


def decoder_nll(x_0: Tensor, mean: Tensor, variance: Tensor, levels: int | None = 256) -> Tensor:
    """-log p(x_0 | x_1) in nats (B,), the bound's last step, where a KL would be infinite.

    p is a Gaussian around `mean`. Images of `levels` values in [-1, 1] get its mass over the
    value's own bin; the outermost bins are open. None means continuous data and its density.
    """
    z = x_0 - mean
    sigma = variance.sqrt()
    if levels is None:
        return (z.square() / variance + (2 * math.pi * variance).log()).flatten(1).sum(1) / 2
    half = 1 / (levels - 1)
    low = torch.where(x_0 <= -1 + half, -math.inf, (z - half) / sigma)
    high = torch.where(x_0 >= 1 - half, math.inf, (z + half) / sigma)
    # Mirror bins above the mean into the lower tail, where the distribution function keeps its
    # digits.
    low, high = torch.where(z > 0, -high, low), torch.where(z > 0, -low, high)
    log_high = torch.special.log_ndtr(high)
    log_low = torch.special.log_ndtr(low)
    return -(log_high + torch.log1p(-(log_low - log_high).exp())).flatten(1).sum(1)


def bits_per_dimension(nats: Tensor, dimensions: int, space: str = "pixels") -> Tensor:
    """Nats per example as bits per colour value; ValueError for a VAE's latents."""
    if space not in PIXEL_SPACES:
        raise ValueError(
            f"bits per dimension need {' or '.join(PIXEL_SPACES)}, got {space!r}: "
            "a bound on latents says nothing about pixels."
        )
    return nats / (dimensions * math.log(2))


def _refuse_clean(s: int | Tensor) -> None:
    if (torch.as_tensor(s) < 0).any():
        raise ValueError(
            f"the step to the clean image (s = {s}) has an infinite KL. Use decoder_nll."
        )
