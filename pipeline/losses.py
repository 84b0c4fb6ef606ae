"""What the network is trained on, and what its predictions are worth: losses with one value per example."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.scheduler import DDPMScheduler

LEVELS = 255  # 8-bit pixels in [-1, 1] are 2 / 255 apart

WEIGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {  # of the squared error of x_0, by SNR
    "simple": lambda snr, gamma: snr,  # (13)
    "min_snr": lambda snr, gamma: snr.clamp(max=gamma),  # Hang et al. 2023
    "velocity": lambda snr, gamma: snr + 1,
    "min_velocity": lambda snr, gamma: (snr + 1).clamp(max=gamma),
    "x_0": lambda snr, gamma: torch.ones_like(snr),
}


def flat_mean(x: Tensor) -> Tensor:
    """The mean over everything but the batch: (B, ...) to (B,)."""
    return x.flatten(1).mean(1)


def flat_sum(x: Tensor) -> Tensor:
    """The sum over everything but the batch: (B, ...) to (B,)."""
    return x.flatten(1).sum(1)


def target(scheduler: DDPMScheduler, x_0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
    """What the network is asked for at x_t: eps, x_0 or the velocity, by the scheduler's prediction_type."""
    kind = scheduler.config.prediction_type
    return {"epsilon": lambda: eps, "sample": lambda: x_0, "v_prediction": lambda: scheduler.get_velocity(x_0, eps, t)}[kind]()


def weight(scheduler: DDPMScheduler, t: Tensor, name: str, gamma: float | None = None) -> Tensor:
    """The weight (B,) of the squared error of the network's own prediction.

    WEIGHTS holds it for x_0; an error in eps is SNR times one in x_0, in v SNR + 1 times, so there it is divided by
    that. ValueError for an unknown name, a missing gamma, or eps at SNR = 0, where no eps determines x_0.
    """
    if name not in WEIGHTS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTS)}, got {name!r}")
    if name.startswith("min_") != (gamma is not None):
        raise ValueError(f"weighting {name!r} {'needs' if gamma is None else 'takes no'} gamma, got gamma={gamma}")
    snr = scheduler.snr(t, torch.empty(1, device=t.device))
    if scheduler.config.prediction_type == "epsilon":
        if (snr == 0).any():
            raise ValueError("prediction_type='epsilon' has no loss at SNR = 0: use v_prediction or sample with "
                             "zero-terminal-SNR schedules")  # fmt: skip
        return WEIGHTS[name](snr, gamma) / snr
    return WEIGHTS[name](snr, gamma) / (snr + 1 if scheduler.config.prediction_type == "v_prediction" else 1)


def training_loss(
    scheduler: DDPMScheduler,
    model_output: Tensor,
    x_0: Tensor,
    eps: Tensor,
    t: Tensor,
    weighting: str = "simple",
    gamma: float | None = None,
) -> Tensor:
    """(13) and its relatives: the weighted mean squared error of a prediction (B, ...), one value per example (B,).

    "simple" is (13) itself for prediction_type epsilon: mean |eps - eps_theta|^2.
    """
    error = flat_mean((model_output - target(scheduler, x_0, eps, t)).square())
    return weight(scheduler, t, weighting, gamma) * error


# -- the variational bound, in nats unless it says bits --------------------------------------------------------------


def step_kl(scheduler: DDPMScheduler, x_0: Tensor, x_0_hat: Tensor, x_t: Tensor, t: int | Tensor, s: int | Tensor) -> Tensor:
    """(11) KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats (B,), for 0 <= s < t; (11) is s = t - 1.

    With fixed_small both variances are beta~ and only the means differ; fixed_large adds the variances' own term.
    """
    mean_q, variance_q = scheduler.posterior(x_0, x_t, t, s)
    mean_p, variance_p = scheduler.transition(x_0_hat, x_t, t, s)
    ratio = variance_q / variance_p
    means = (mean_q - mean_p).square() / variance_p
    return flat_sum((means + ratio - 1 - ratio.log()) / 2)


def noise_kl(scheduler: DDPMScheduler, eps: Tensor, eps_hat: Tensor, t: int | Tensor) -> Tensor:
    """(12) the same KL in terms of the noise, s = t - 1: beta^2 / (2 beta~ alpha (1 - abar)) |eps - eps_hat|^2 (B,)."""
    abar_t, abar_s = scheduler.abar(t, eps), scheduler.abar(t - 1, eps)
    alpha = abar_t / abar_s
    beta = 1 - alpha
    beta_tilde = (1 - abar_s) / (1 - abar_t) * beta  # (9)
    return flat_sum(beta**2 / (2 * beta_tilde * alpha * (1 - abar_t)) * (eps - eps_hat).square())


def prior_kl(scheduler: DDPMScheduler, x_0: Tensor) -> Tensor:
    """(6) KL(q(x_T | x_0) || N(0, I)) in nats (B,): what the end of the chain still knows of the image."""
    abar = scheduler.abar(len(scheduler) - 1, x_0)
    return flat_sum((abar * x_0.square() - abar - torch.log1p(-abar)) / 2)


def decoder_nll(scheduler: DDPMScheduler, x_0: Tensor, x_0_hat: Tensor, *, pixels: bool) -> Tensor:
    """-log p(x_0 | x_1) in nats (B,): the last step, whose beta~ is 0, is a likelihood with the variance beta~_2.

    `pixels`: the probability of 8-bit values in [-1, 1], a Gaussian's mass in their bins, the outer ones open; else a
    density.
    """
    one = torch.ones((), dtype=x_0.dtype, device=x_0.device)
    sigma = scheduler.posterior(one, one, 1, 0)[1].sqrt()
    if not pixels:
        return flat_sum(((x_0 - x_0_hat) / sigma).square() / 2 + sigma.log() + math.log(2 * math.pi) / 2)
    z, half = ((x_0 - x_0_hat) / sigma).double(), (1 / LEVELS / sigma).double()
    below = torch.special.log_ndtr(torch.where(x_0 > 0, -z, z) + half)  # all that lies beyond an outer value's bin edge
    left, right = torch.special.log_ndtr(-z.abs() - half), torch.special.log_ndtr(-z.abs() + half)
    inside = right + torch.log(-torch.expm1(left - right))  # in the left tail, where differences keep their digits
    outer = x_0.abs() > 1 - 1 / LEVELS
    return -flat_sum(torch.where(outer, below, inside)).to(x_0.dtype)


def vlb(scheduler: DDPMScheduler, predict: Callable[[Tensor, int], Tensor], x_0: Tensor, noise: Callable[[int], Tensor], *,
        pixels: bool, timesteps: list[int] | None = None) -> dict[str, Tensor]:  # fmt: skip
    """The variational bound on -log p(x_0) in nats, its terms and their sum, (B,) each.

    `predict(x_t, t)` is the network, `noise(t)` the eps (B, ...) of the direct jump to t. `timesteps` estimates the sum
    over t = 1 … T-1 by a mean over those times T - 1; None takes all.
    """
    T = len(scheduler)
    chosen = list(range(1, T)) if timesteps is None else timesteps

    def x_0_hat(t):
        x_t = scheduler.add_noise(x_0, noise(t), t)
        return scheduler.clip(scheduler.predict_x_0(predict(x_t, t), t, x_t)), x_t

    steps = torch.zeros(len(x_0), dtype=x_0.dtype, device=x_0.device)
    for t in chosen:
        guess, x_t = x_0_hat(t)
        steps = steps + step_kl(scheduler, x_0, guess, x_t, t, t - 1) * (T - 1) / len(chosen)
    prior, decoder = prior_kl(scheduler, x_0), decoder_nll(scheduler, x_0, x_0_hat(0)[0], pixels=pixels)
    return {"prior": prior, "steps": steps, "decoder": decoder, "total": prior + steps + decoder}


def bits_per_dim(nats: Tensor, x_0: Tensor, *, lossless: bool) -> Tensor:
    """Nats per image (B,) as bits per pixel value; ValueError for a VAE's latents, whose dimensions are no pixels."""
    if not lossless:
        raise ValueError("bits per dimension are of pixels (or their lossless patches), not of a VAE's latents: report nats")
    return nats / (x_0[0].numel() * math.log(2))
