"""Training objectives and the terms of the variational bound, one value per example.

Numbers in brackets are the equations of docs/equations.md. Every objective is a weight times the squared error of x_0;
the table below holds those weights, `weight` translates them for a network that predicts eps or v instead.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .scheduler import DDPMScheduler

# Weights of the squared error of x_0, as functions of (snr, gamma). In eps terms the first is 1: that is (13).
LOSS_WEIGHTS: dict[str, Callable[[Tensor, float | None], Tensor]] = {
    "simple": lambda snr, gamma: snr,
    "min_snr": lambda snr, gamma: snr.clamp(max=gamma),
    "velocity": lambda snr, gamma: snr + 1,
    "min_velocity": lambda snr, gamma: (snr + 1).clamp(max=gamma),
    "x_0": lambda snr, gamma: torch.ones_like(snr),
}
PIXEL_SPACES = (
    "pixels",
    "patches",
)  # where a bit per dimension means a bit per colour value of the image


def network_target(scheduler: DDPMScheduler, x_0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
    """What the network should have predicted: eps, x_0 or v, by the scheduler's prediction_type."""
    if scheduler.config.prediction_type == "epsilon":
        return eps
    if scheduler.config.prediction_type == "sample":
        return x_0
    return scheduler.get_velocity(x_0, eps, t)


def loss_weight(
    scheduler: DDPMScheduler, t: Tensor, name: str = "simple", gamma: float | None = None
) -> Tensor:
    """The weight (B,) of the squared error of what the network predicts, for timesteps t (B,).

    The squared error of x_0 is that of eps divided by SNR, and that of v divided by SNR + 1. ValueError for an unknown
    name, a `gamma` that is missing or unused, and for epsilon where SNR = 0.
    """
    if name not in LOSS_WEIGHTS:
        raise ValueError(f"weighting must be one of {', '.join(LOSS_WEIGHTS)}, got {name!r}")
    if name.startswith("min_") != (gamma is not None) or (
        gamma is not None and not 0 < gamma < math.inf
    ):
        raise ValueError(
            f"gamma clips min_snr and min_velocity, where it must be above 0, and nothing else: got "
            f"gamma={gamma} with weighting {name!r}"
        )
    snr = scheduler.snr(t, torch.zeros(1, device=t.device))
    if scheduler.config.prediction_type == "sample":
        return LOSS_WEIGHTS[name](snr, gamma)
    if scheduler.config.prediction_type == "v_prediction":
        return LOSS_WEIGHTS[name](snr, gamma) / (snr + 1)
    if scheduler.ends_without_signal and (snr == 0).any():
        raise ValueError(
            "prediction_type='epsilon' has no weight where SNR = 0: the noise says nothing about x_0. "
            "Train v_prediction or sample, or without rescale_betas_zero_snr."
        )
    return LOSS_WEIGHTS[name](snr, gamma) / snr


def training_loss(
    scheduler: DDPMScheduler,
    model_output: Tensor,
    x_0: Tensor,
    eps: Tensor,
    t: Tensor,
    weighting: str = "simple",
    gamma: float | None = None,
) -> Tensor:
    """(13), and its weighted relatives: weight times the mean squared error over the dimensions, (B,)."""
    error = (network_target(scheduler, x_0, eps, t) - model_output).square().flatten(1).mean(1)
    return loss_weight(scheduler, t, weighting, gamma) * error


# -- the variational bound, in nats summed over the dimensions -------------------------------------------------------


def posterior_kl(
    scheduler: DDPMScheduler,
    x_0: Tensor,
    x_0_hat: Tensor,
    x_t: Tensor,
    t: int | Tensor,
    s: int | Tensor,
) -> Tensor:
    """(11) KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)) in nats (B,); ValueError at s = -1, where a density has no KL.

    With fixed_small both variances are beta~ and this is ‖mu~ - mu‖² / (2 beta~); with fixed_large the variances' own
    difference adds to it.
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
    """(12) beta² / (2 beta~ alpha (1 - abar_t)), what turns ‖eps - eps_hat‖² into the KL of (11)."""
    _refuse_clean(s)
    abar_t, abar_s = scheduler.abar(t, like), scheduler.abar(s, like)
    alpha = abar_t / abar_s
    variance = (1 - abar_s) / (1 - abar_t) * (1 - alpha)
    return (1 - alpha) ** 2 / (2 * variance * alpha * (1 - abar_t))


def noise_kl(
    scheduler: DDPMScheduler, eps: Tensor, eps_hat: Tensor, t: int | Tensor, s: int | Tensor
) -> Tensor:
    """(12) the KL of (11), with fixed_small, from the error in the noise: nats (B,)."""
    return (kl_noise_weight(scheduler, t, s, eps) * (eps - eps_hat).square()).flatten(1).sum(1)


def prior_kl(scheduler: DDPMScheduler, x_0: Tensor, t: int) -> Tensor:
    """KL(q(x_t | x_0) ‖ N(0, I)) at the chain's first timestep t, in nats (B,): what (6) leaves of the image."""
    abar_t = scheduler.abar(t, x_0)
    return (abar_t * x_0.square() - abar_t - (1 - abar_t).log()).flatten(1).sum(1) / 2


def decoder_nll(x_0: Tensor, mean: Tensor, variance: Tensor, levels: int | None = 256) -> Tensor:
    """-log p(x_0 | x_1) in nats (B,), the bound's last step, where a KL would be infinite.

    p is a Gaussian around `mean`. Images with so many `levels` in [-1, 1] get its mass over the level's own bin (the
    outermost bins are open); None means continuous data and its density.
    """
    z, sigma = x_0 - mean, variance.sqrt()
    if levels is None:
        return (z.square() / variance + (2 * math.pi * variance).log()).flatten(1).sum(1) / 2
    half = 1 / (levels - 1)
    low = torch.where(x_0 <= -1 + half, -math.inf, (z - half) / sigma)
    high = torch.where(x_0 >= 1 - half, math.inf, (z + half) / sigma)
    low, high = (
        torch.where(z > 0, -high, low),
        torch.where(z > 0, -low, high),
    )  # the lower tail keeps its digits
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return -(log_high + torch.log1p(-(log_low - log_high).exp())).flatten(1).sum(1)


def vlb(
    scheduler: DDPMScheduler,
    predict: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,
    generator: torch.Generator | None = None,
    levels: int | None = 256,
) -> dict[str, Tensor]:
    """The terms of the variational bound on -log p(x_0) in nats: prior (B,), steps (B, n-1) and decoder (B,).

    The chain is the scheduler's plan: all T timesteps, or those of `set_timesteps`. `predict(x_t, t)` is the network,
    t (B,); it is called once a timestep, and its x_0 is clipped as in sampling. Each term is a one-sample estimate.
    """
    plan = [int(t) for t in scheduler.timesteps]
    if len(plan) < 2:
        raise ValueError(f"the bound needs a chain of at least 2 timesteps, got {len(plan)}")
    steps = []
    for t, s in zip(plan, [*plan[1:], -1], strict=True):
        eps = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype, device=x_0.device)
        x_t = scheduler.add_noise(x_0, eps, t)
        output = predict(x_t, torch.full((len(x_0),), t, device=x_0.device))
        x_0_hat = scheduler.clip(scheduler.predict_x_0(output, t, x_t))
        if s >= 0:
            steps.append(posterior_kl(scheduler, x_0, x_0_hat, x_t, t, s))
    variance = scheduler.posterior(x_0, x_0, plan[-2], plan[-1])[1]  # beta~_2, since beta~_1 = 0
    last = decoder_nll(x_0, x_0_hat, variance, levels)
    return {
        "prior": prior_kl(scheduler, x_0, plan[0]),
        "steps": torch.stack(steps, 1),
        "decoder": last,
    }


def bits_per_dimension(nats: Tensor, dimensions: int, space: str = "pixels") -> Tensor:
    """Nats per example as bits per colour value; ValueError for a VAE's latents, whose bits are not the image's."""
    if space not in PIXEL_SPACES:
        raise ValueError(
            f"bits per dimension are defined for {' and '.join(PIXEL_SPACES)} (a permutation of pixels), got "
            f"{space!r}: a bound on latents says nothing about pixels"
        )
    return nats / (dimensions * math.log(2))


def _refuse_clean(s: int | Tensor) -> None:
    if (torch.as_tensor(s) < 0).any():
        raise ValueError(
            "the step to the clean image (s = -1) has beta~ = 0 and an infinite KL; its term is `decoder`"
        )
